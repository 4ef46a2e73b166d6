"""The update: ratio one at the start, the gradient of the whole minibatch, and nobody moves who isn't named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from marl_core import AdapterBank, NumericError, View
from marl_core.config.run_config import PPOSection, RunConfig
from marl_core.ppo.budget import PassLimits
from marl_core.ppo.estimators import estimate_advantages
from marl_core.ppo.ranks import ONE_PROCESS
from marl_core.ppo.roles import TrainableRoles
from marl_core.ppo.scoring import view_output, view_values
from marl_core.ppo.types import ScoredRollout, UpdateStats
from marl_core.ppo.update import TrainingBatch, Update, minibatches
from marl_core.run.optimizer import make_optimizer
from marl_core.testing import fake_rollout, tiny_bank
from marl_core.testing.kinds import make_config

# Uneven lengths: 13, 3, 1 and 7 tokens, so that a mean of microbatch means is not the mean.
ROLLOUT = fake_rollout([("A good", " little film."), ("Bad", "!!"), ("It", ""), ("What a", " surprise")]).select(
    torch.tensor([0, 1, 2, 3])
)
SCORES = torch.tensor([2.0, -1.0, 0.5, -3.0])
TEMPERATURE = 0.9


def ppo(**options: Any) -> PPOSection:
    """One epoch over one minibatch, without gradient clipping, unless `options` say otherwise."""
    given = {
        "batch": 4,
        "minibatch": 4,
        "epochs": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": None,
        "kl": {"coef": 0.0},
        **options,
    }
    return PPOSection.model_validate(given)


class Case:
    """A bank with a policy, a value function and a bystander, and a rollout scored by them."""

    def __init__(self, own_value: bool = False, value: bool = True) -> None:
        self.bank: AdapterBank = tiny_bank()
        for seed, name in enumerate(["policy", "bystander", *(["value"] if own_value else [])]):
            self.bank.add(name, make_config(4, 8, "all-linear", 0.0, {}, self.bank.linears), seed=seed)
        if value:
            self.bank.add_value_head("value-head")
        self.trained = TrainableRoles("policy", "value-head" if value else None, "value" if own_value else None)
        random = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in self.everything().values():
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)

    def everything(self) -> dict[str, Tensor]:
        names = [*self.bank.adapters, *self.bank.heads]
        return {f"{name}: {key}": p for name in names for key, p in self.bank.parameters(name).items()}

    def roles(self) -> dict[str, dict[str, Any]]:
        return dict(self.trained.parameters(self.bank))

    def score(self, ppo: PPOSection, scores: Tensor = SCORES) -> TrainingBatch:
        limits = PassLimits(ppo.microbatch or ppo.minibatch)
        passed = view_output(
            self.bank, View("policy"), ROLLOUT, TEMPERATURE, limits, value_head=self.trained.policy_head
        )
        values = passed.values
        if self.trained.value_adapter and self.trained.value_head:
            values = view_values(self.bank, self.trained.value_adapter, self.trained.value_head, ROLLOUT, limits)
        reference = view_output(self.bank, View(None), ROLLOUT, TEMPERATURE, limits).logprobs if ppo.kl.coef else None
        scored = ScoredRollout(ROLLOUT, passed.logprobs, reference, values, scores)
        return TrainingBatch(scored, estimate_advantages(scored, ppo))

    def update(
        self, ppo: PPOSection, optimizer: torch.optim.Optimizer | None = None, batch: TrainingBatch | None = None
    ) -> UpdateStats:
        generator = torch.Generator().manual_seed(0)
        update = Update(
            self.bank,
            self.trained,
            ppo,
            TEMPERATURE,
            PassLimits(ppo.microbatch or ppo.minibatch),
            ONE_PROCESS,
            optimizer or self.optimizer(ppo),
            ppo.kl.coef,
        )
        return update.run(batch or self.score(ppo), generator)

    def optimizer(self, ppo: PPOSection, **value: Any) -> torch.optim.AdamW:
        config = RunConfig.model_validate(
            {
                "model": {"path": "tiny"},
                "reference": "disabled-adapter",
                "reward": "function",
                "ppo": ppo,
                "value": value,
            }
        )
        return make_optimizer(self.trained.parameters(self.bank), config)

    def gradients(self, ppo: PPOSection, scores: Tensor = SCORES) -> dict[str, Tensor]:
        """The gradients that the one optimizer step of this update would use."""
        recorder = Recorder(self.roles())
        self.update(ppo, recorder, self.score(ppo, scores))
        assert len(recorder.steps) == 1
        return recorder.steps[0]


class Recorder(torch.optim.SGD):
    """An optimizer that never moves anything and remembers the gradients of each step."""

    def __init__(self, roles: dict[str, dict[str, Any]]) -> None:
        self.named = {f"{role}/{name}": p for role, found in roles.items() for name, p in found.items()}
        self.steps: list[dict[str, Tensor]] = []
        super().__init__(list(self.named.values()), lr=0.0)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # nothing is returned
        self.steps.append({name: p.grad.clone() for name, p in self.named.items() if p.grad is not None})


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


class TestRatio:
    @pytest.mark.parametrize(
        "options", [{}, {"microbatch": 2}, {"minibatch": 2}, {"minibatch": 1}, {"minibatch": 2, "microbatch": 1}]
    )
    @pytest.mark.parametrize("own_value", [False, True])
    def test_is_bitwise_one_in_the_first_minibatch(self, options: dict[str, Any], own_value: bool) -> None:
        stats = Case(own_value).update(ppo(epochs=3, **options))
        assert stats.first_ratio_error == 0.0
        assert stats.ratio_max > 1.0  # and not later, or the test above would say nothing

    def test_first_epoch_in_order_later_ones_shuffled(self) -> None:
        generator = torch.Generator().manual_seed(0)
        assert [rows.tolist() for rows in minibatches(5, 2, None)] == [[0, 1], [2, 3], [4]]
        shuffled = [row for rows in minibatches(50, 8, generator) for row in rows.tolist()]
        assert sorted(shuffled) == list(range(50))
        assert shuffled != list(range(50))

    def test_the_first_epochs_minibatches_are_the_pieces_that_were_scored(self) -> None:
        case, settings = Case(), ppo(minibatch=2)
        batch = case.score(settings)
        recorder, alone = Recorder(case.roles()), Recorder(case.roles())
        case.update(settings, recorder, batch)
        case.update(settings, alone, batch.select(torch.tensor([0, 1])))
        assert len(recorder.steps) == 2
        assert torch.equal(flat(recorder.steps[0]), flat(alone.steps[0]))

    def test_each_minibatch_starts_without_the_gradient_of_the_one_before(self) -> None:
        case, settings = Case(), ppo(minibatch=2)
        batch = case.score(settings)
        recorder, alone = Recorder(case.roles()), Recorder(case.roles())  # neither moves a weight
        case.update(settings, recorder, batch)
        case.update(settings, alone, batch.select(torch.tensor([2, 3])))
        assert torch.equal(flat(recorder.steps[1]), flat(alone.steps[0]))

    def test_no_learning_rate_no_change(self) -> None:
        case = Case()
        before = {name: p.detach().clone() for name, p in case.everything().items()}
        stats = case.update(ppo(epochs=3, learning_rate=1e-45))
        assert (stats.ratio_min, stats.ratio_max, stats.approx_kl, stats.clipfrac) == (1.0, 1.0, 0.0, 0.0)
        assert all(torch.equal(p, before[name]) for name, p in case.everything().items())


class TestGradient:
    @pytest.mark.parametrize("aggregation", ["token", "sequence"])
    @pytest.mark.parametrize("microbatch", [1, 2])
    @pytest.mark.parametrize("own_value", [False, True])
    def test_of_microbatches_is_that_of_the_minibatch(self, aggregation: str, microbatch: int, own_value: bool) -> None:
        options: dict[str, Any] = {
            "aggregation": aggregation,
            "entropy_coef": 0.1,
            "kl": {"coef": 0.3, "into": "loss", "estimator": "k3"},
        }
        whole = Case(own_value).gradients(ppo(**options))
        parts = Case(own_value).gradients(ppo(microbatch=microbatch, **options))
        assert set(whole) == set(parts)
        assert float((flat(parts) - flat(whole)).norm() / flat(whole).norm()) < 1e-6

    def test_token_and_sequence_mean_differ_here(self) -> None:
        one, other = (flat(Case().gradients(ppo(aggregation=how))) for how in ("token", "sequence"))
        assert float((one - other).norm() / one.norm()) > 0.1

    def test_is_that_of_the_textbook_loss(self) -> None:
        """REINFORCE: at ratio one the policy's gradient is that of -mean(A log p)."""
        case, settings = Case(value=False), ppo(advantage="rloo", samples_per_prompt=2)
        found = case.gradients(settings)
        advantages = case.score(settings).advantages.advantages
        with case.bank.using("policy") as model:
            logits = model(
                input_ids=ROLLOUT.sequence_ids, attention_mask=ROLLOUT.sequence_mask.long(), position_ids=positions()
            ).logits
            start = ROLLOUT.prompts.ids.shape[1] - 1
            logp = (logits[:, start:-1] / TEMPERATURE).log_softmax(-1).gather(2, ROLLOUT.ids[:, :, None]).squeeze(2)
            loss = -(advantages * logp)[ROLLOUT.mask].mean()
            names = {f"policy/{name}": p for name, p in case.bank.parameters("policy").items()}
            expected = dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))
        assert float((flat(found) - flat(expected)).norm() / flat(expected).norm()) < 1e-5

    def test_every_named_tensor_has_one(self) -> None:
        case = Case(own_value=True)
        gradients = case.gradients(ppo())
        assert set(gradients) == {f"{role}/{name}" for role, found in case.roles().items() for name in found}
        for name, gradient in gradients.items():
            assert torch.count_nonzero(gradient) > 0, name

    def test_of_a_role_is_clipped_by_itself(self) -> None:
        case = Case(own_value=True)
        free = case.gradients(ppo())
        clipped = Case(own_value=True).gradients(ppo(max_grad_norm=1e-3))
        for role in ("policy", "value"):
            mine = [name for name in free if name.startswith(role + "/")]
            before, after = (torch.cat([g[name].flatten() for name in mine]) for g in (free, clipped))
            assert float(before.norm()) > 1e-3
            assert float(after.norm()) == pytest.approx(1e-3, rel=1e-2)
            assert float(torch.nn.functional.cosine_similarity(before, after, dim=0)) == pytest.approx(1.0, abs=1e-5)

    def test_norms_are_logged_as_they_were_before_clipping(self) -> None:
        case = Case(own_value=True)
        free = case.gradients(ppo())
        stats = Case(own_value=True).update(ppo(max_grad_norm=1e-3))
        for role, logged in (("policy", stats.policy_grad_norm), ("value", stats.value_grad_norm)):
            norm = torch.cat([g.flatten() for name, g in free.items() if name.startswith(role + "/")]).norm()
            assert logged == pytest.approx(float(norm), rel=1e-5)

    def test_kl_in_the_loss_pulls_to_the_reference(self) -> None:
        """With no advantage at all, the step is towards the reference."""
        settings = ppo(
            kl={"coef": 1.0, "into": "loss", "estimator": "k3"},
            learning_rate=1e-3,
            epochs=5,
            whiten=False,
            value_coef=0.0,
        )
        case = Case(value=False)
        settings = settings.model_copy(update={"advantage": "rloo", "samples_per_prompt": 2})
        batch = case.score(settings, torch.zeros(4))
        before = distance(case)
        case.update(settings, batch=batch)
        assert distance(case) < 0.9 * before

    def test_entropy_bonus_raises_entropy(self) -> None:
        case = Case(value=False)
        settings = ppo(advantage="rloo", samples_per_prompt=2, entropy_coef=1.0, epochs=5, learning_rate=1e-3)
        before = entropy(case)
        case.update(settings, batch=case.score(settings, torch.zeros(4)))
        assert entropy(case) > before + 0.01

    def test_a_larger_value_coefficient_pulls_harder_on_a_shared_trunk(self) -> None:
        one, two = (Case().gradients(ppo(value_coef=c), torch.zeros(4)) for c in (0.1, 0.2))
        heads = [name for name in one if name.startswith("value/")]
        assert len(heads) == 2
        for name in heads:
            torch.testing.assert_close(two[name], 2 * one[name])


def positions() -> Tensor:
    return (ROLLOUT.sequence_mask.long().cumsum(1) - 1).clamp(min=0)


def distance(case: Case) -> float:
    """Mean squared log ratio to the bare base."""
    mine, base = (
        view_output(case.bank, View(name), ROLLOUT, TEMPERATURE, PassLimits(4)).logprobs for name in ("policy", None)
    )
    return float((mine - base)[ROLLOUT.mask].square().mean())


def entropy(case: Case) -> float:
    return float(
        view_output(case.bank, View("policy"), ROLLOUT, TEMPERATURE, PassLimits(4), entropy=True)
        .entropy[ROLLOUT.mask]
        .mean()
    )


class TestWhoMoves:
    @pytest.mark.parametrize("own_value", [False, True])
    def test_only_the_named_adapters_and_heads(self, own_value: bool, base_state: Any) -> None:
        case = Case(own_value)
        before = {name: p.detach().clone() for name, p in case.everything().items()}
        base = base_state(case.bank)
        case.update(ppo(epochs=2))
        named = ("policy: ", "value: ", "value-head: ")
        for name, parameter in case.everything().items():
            assert torch.equal(parameter, before[name]) == (not name.startswith(named)), name
        assert all(torch.equal(tensor, base[name]) for name, tensor in base_state(case.bank).items())

    def test_no_gradient_is_left_behind(self) -> None:
        case = Case(own_value=True)
        case.update(ppo(epochs=2))
        assert all(parameter.grad is None for parameter in case.bank.all_parameters().values())
        assert all(parameter.grad is None for parameter in case.everything().values())

    def test_the_value_has_a_learning_rate_of_its_own(self) -> None:
        case = Case(own_value=True)
        before = {name: p.detach().clone() for name, p in case.everything().items()}
        settings = ppo(learning_rate=1e-2)
        case.update(settings, case.optimizer(settings, learning_rate=1e-4))
        moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in case.everything().items()}
        # Adam's first step is the learning rate, wherever there is a gradient.
        assert max(step for name, step in moved.items() if name.startswith("policy:")) == pytest.approx(1e-2, rel=0.05)
        assert max(step for name, step in moved.items() if name.startswith("value")) == pytest.approx(1e-4, rel=0.05)


class TestStopping:
    def test_max_kl_ends_the_update_before_the_step(self) -> None:
        settings = ppo(epochs=10, max_kl=1e-6)
        case = Case()
        stats = case.update(settings)
        assert stats.optimizer_steps == 1.0  # the first minibatch has KL 0, the second is already too far
        assert stats.stopped_early == 1.0
        assert Case().update(settings.model_copy(update={"max_kl": 1e6})).stopped_early == 0.0
        after = {name: p.detach().clone() for name, p in case.everything().items()}
        other = Case()
        other.update(ppo(epochs=1))
        assert all(torch.equal(p, after[name]) for name, p in other.everything().items())

    @pytest.mark.parametrize("scores", [float("nan"), float("inf")])
    def test_a_loss_that_is_not_finite_moves_nothing(self, scores: float) -> None:
        case, settings = Case(), ppo(whiten=False)
        before = {name: p.detach().clone() for name, p in case.everything().items()}
        with pytest.raises(NumericError, match="the loss is"):
            case.update(settings, batch=case.score(settings, torch.full((4,), scores)))
        assert all(torch.equal(p, before[name]) for name, p in case.everything().items())
        assert case.bank.active is None

    def test_a_gradient_that_is_not_finite_moves_nothing(self) -> None:
        case = Case()
        before = {name: p.detach().clone() for name, p in case.everything().items()}
        next(iter(case.bank.parameters("policy").values())).register_hook(lambda gradient: gradient * float("nan"))
        with pytest.raises(NumericError, match="the gradient norm of the policy is nan"):
            case.update(ppo(max_grad_norm=1.0))
        assert all(torch.equal(p, before[name]) for name, p in case.everything().items())

    def test_a_value_function_needs_values(self) -> None:
        case, settings = Case(), ppo()
        batch = case.score(settings)
        s = batch.scored
        with pytest.raises(ValueError, match="scored without values"):
            case.update(
                settings,
                batch=TrainingBatch(ScoredRollout(s.rollout, s.logprobs, None, None, s.scores), batch.advantages),
            )


class TestStats:
    def test_counts_and_rates(self) -> None:
        stats = Case().update(ppo(epochs=3, minibatch=2, learning_rate=1e-3))
        assert stats.optimizer_steps == 6.0
        assert stats.learning_rate == 1e-3
        assert stats.ratio_min < 1.0 < stats.ratio_max
        assert stats.approx_kl > 0
        assert stats.ratio_std > 0

    def test_without_a_value_function_its_numbers_are_zero(self) -> None:
        stats = Case(value=False).update(ppo(advantage="rloo", samples_per_prompt=2))
        assert (stats.value_loss, stats.value_clipfrac, stats.value_grad_norm) == (0.0, 0.0, 0.0)

    def test_policy_loss_at_ratio_one_is_minus_the_mean_advantage(self) -> None:
        case, settings = Case(), ppo(whiten=False)
        advantages = case.score(settings).advantages.advantages
        assert case.update(settings).policy_loss == pytest.approx(-float(advantages[ROLLOUT.mask].mean()), rel=1e-5)
