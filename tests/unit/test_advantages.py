"""From scores to advantages: where the KL goes, what each estimator sees, worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from marl_core import AdvantageInputs, ConfigError, Estimator, PluginError, ScoredRollout, Strategy, hookimpl
from marl_core.config.run_config import PPOSection
from marl_core.ppo.estimators import estimate_advantages
from marl_core.ppo.objectives import generalized_advantage_estimation, masked_whiten
from marl_core.testing import fake_rollout

# Two prompts, two responses each, of 3, 2, 1 and 3 tokens (the last response has no EOS).
ROLLOUT = fake_rollout([("a", "xy"), ("a", "x"), ("b", ""), ("b", "xyz")])
MASK = ROLLOUT.mask
SCORES = torch.tensor([4.0, 2.0, 1.0, -1.0])


def scored(log_ratio: Tensor | None = None, values: Tensor | None = None) -> ScoredRollout:
    """Policy log-probs -1 everywhere; the reference is `log_ratio` below."""
    logprobs = torch.full(MASK.shape, -1.0).masked_fill(~MASK, 0.0)
    reference = None if log_ratio is None else (logprobs - log_ratio).masked_fill(~MASK, 0.0)
    return ScoredRollout(ROLLOUT, logprobs, reference, values, SCORES)


def ppo(**options: Any) -> PPOSection:
    return PPOSection.model_validate({"batch": 4, "minibatch": 4, **options})


def test_the_rollout_is_what_the_tables_below_assume() -> None:
    assert ROLLOUT.lengths.tolist() == [3, 2, 1, 3]


class TestGAE:
    values = torch.full(MASK.shape, 0.5).masked_fill(~MASK, 0.0)

    def test_rewards_advantages_and_returns(self) -> None:
        # k1 = 0.2 a token, coefficient 0.5: -0.1 a token, and the score on the last
        found = estimate_advantages(
            scored(torch.full(MASK.shape, 0.2), self.values), ppo(whiten=False, kl={"coef": 0.5})
        )
        torch.testing.assert_close(found.kl, torch.full(MASK.shape, 0.2).masked_fill(~MASK, 0.0))
        expected = torch.tensor([[-0.1, -0.1, 3.9], [-0.1, 1.9, 0.0], [0.9, 0.0, 0.0], [-0.1, -0.1, -1.1]])
        torch.testing.assert_close(found.rewards, expected)
        advantages, returns = generalized_advantage_estimation(expected, self.values, MASK, 1.0, 0.95)
        torch.testing.assert_close(found.advantages, advantages)
        torch.testing.assert_close(found.returns, returns)
        # Response 2 is one token: A = 0.9 - 0.5
        assert found.advantages[2].tolist() == pytest.approx([0.4, 0, 0])

    def test_gamma_and_lam_arrive(self) -> None:
        one = estimate_advantages(scored(None, self.values), ppo(whiten=False, gamma=0.5, lam=0.25))
        advantages, _ = generalized_advantage_estimation(one.rewards, self.values, MASK, 0.5, 0.25)
        torch.testing.assert_close(one.advantages, advantages)

    def test_whitening_is_of_advantages_not_of_returns(self) -> None:
        plain = estimate_advantages(scored(None, self.values), ppo(whiten=False))
        white = estimate_advantages(scored(None, self.values), ppo(whiten=True))
        torch.testing.assert_close(white.advantages, masked_whiten(plain.advantages, MASK))
        assert white.returns is not None
        assert plain.returns is not None
        assert torch.equal(white.returns, plain.returns)

    def test_values_are_needed(self) -> None:
        with pytest.raises(ConfigError, match="gae needs values"):
            estimate_advantages(scored(), ppo())


class TestCriticFree:
    def test_rloo_by_hand(self) -> None:
        # groups (4, 2) and (1, -1): +2, -2, +2, -2 for every token of the response
        found = estimate_advantages(scored(), ppo(advantage="rloo", samples_per_prompt=2))
        assert torch.equal(found.advantages, torch.tensor([[2.0], [-2.0], [2.0], [-2.0]]) * MASK)
        assert found.returns is None

    def test_the_penalty_of_the_whole_response_counts(self) -> None:
        # k1 = 1 a token, coefficient 1: totals 4-3, 2-2, 1-1, -1-3: groups (1, 0) and (0, -4)
        found = estimate_advantages(
            scored(torch.ones(MASK.shape)), ppo(advantage="rloo", samples_per_prompt=2, kl={"coef": 1.0})
        )
        assert torch.equal(found.advantages, torch.tensor([[1.0], [-1.0], [4.0], [-4.0]]) * MASK)

    def test_grpo_by_hand(self) -> None:
        # both groups are mean +- 1, std sqrt(2): 1 / (1.41421356 + 1e-4) = 0.70705678
        found = estimate_advantages(scored(), ppo(advantage="grpo", samples_per_prompt=2))
        torch.testing.assert_close(found.advantages, 0.70705678 * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]) * MASK)

    def test_groups_must_be_whole(self) -> None:
        with pytest.raises(ConfigError, match=r"4 responses can't be grouped by samples_per_prompt 3"):
            estimate_advantages(scored(), ppo(advantage="rloo", samples_per_prompt=3, batch=6, minibatch=6))

    def test_one_response_is_no_group(self) -> None:
        with pytest.raises(
            ConfigError, match=r"advantage grpo compares responses to one prompt: samples_per_prompt must"
        ):
            estimate_advantages(scored(), ppo(advantage="grpo"))

    def test_a_copied_section_may_hold_a_name(self) -> None:
        copied = ppo().model_copy(update={"advantage": "rloo", "samples_per_prompt": 2})
        expected = estimate_advantages(scored(), ppo(advantage="rloo", samples_per_prompt=2))
        assert torch.equal(estimate_advantages(scored(), copied).advantages, expected.advantages)


class Own(Strategy):
    """An estimator of one's own: whatever it is given."""

    _estimate: Callable[[AdvantageInputs], Any] = lambda inputs: inputs.scores
    _values: bool = False

    @classmethod
    def of(cls, estimate: Callable[[AdvantageInputs], Any], values: bool = False) -> Own:
        made = cls()
        made._estimate, made._values = estimate, values
        return made

    @hookimpl
    def marl_advantage(self) -> Estimator:
        return Estimator(self._estimate, needs_values=self._values)


def by(estimate: Callable[[AdvantageInputs], Any], values: bool = False, **options: Any) -> Any:
    """The advantages that one's own estimator gives; with values where it needs them."""
    given = torch.full(MASK.shape, 0.5) if values else None
    return estimate_advantages(scored(None, given), ppo(advantage=Own.of(estimate, values), **options))


class TestOnesOwn:
    def test_a_number_for_each_response_stands_on_its_tokens(self) -> None:
        assert torch.equal(by(lambda inputs: inputs.scores).advantages, SCORES[:, None] * MASK)

    def test_a_number_for_each_token_is_taken_where_the_token_counts(self) -> None:
        found = by(lambda inputs: inputs.rewards.masked_fill(~inputs.mask, float("nan")).double())
        assert torch.equal(found.advantages, found.rewards)
        assert found.advantages.dtype == torch.float32

    def test_what_it_is_given(self) -> None:
        seen: list[AdvantageInputs] = []

        def look(inputs: AdvantageInputs) -> Tensor:
            seen.append(inputs)
            return inputs.rewards

        by(look, samples_per_prompt=2, gamma=0.5, lam=0.25, whiten=False)
        (inputs,) = seen
        assert (inputs.samples_per_prompt, inputs.gamma, inputs.lam, inputs.whiten) == (2, 0.5, 0.25, False)
        assert inputs.values is None
        assert torch.equal(inputs.scores, SCORES)
        assert torch.equal(inputs.mask, MASK)

    def test_with_values_it_gives_returns_too(self) -> None:
        def above(inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
            assert inputs.values is not None
            return inputs.rewards - inputs.values, inputs.rewards

        found = by(above, values=True)
        assert torch.equal(found.returns, found.rewards)
        assert torch.equal(found.advantages, (found.rewards - 0.5) * MASK)

    def test_what_it_writes_into_is_a_copy(self) -> None:
        batch, taken = scored(None, torch.full(MASK.shape, 0.5)), MASK.clone()

        def spoil(inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
            assert inputs.values is not None
            for tensor in (inputs.rewards, inputs.values):
                tensor.fill_(7.0)
            inputs.mask.fill_(True)
            return inputs.rewards, inputs.values

        found = estimate_advantages(batch, ppo(advantage=Own.of(spoil, True)))
        assert float(found.rewards.sum()) == float(SCORES.sum())
        assert torch.equal(found.advantages, 7.0 * taken)
        assert batch.values is not None
        assert torch.equal(batch.values, torch.full(MASK.shape, 0.5))
        assert torch.equal(MASK, taken)

    def test_an_estimator_given_beside_the_config_counts(self) -> None:
        estimator = Estimator(lambda inputs: inputs.scores)
        found = estimate_advantages(scored(), ppo(), estimator=estimator)
        assert torch.equal(found.advantages, SCORES[:, None] * MASK)

    @pytest.mark.parametrize(
        ("estimate", "values", "message"),
        [
            (lambda inputs: inputs.scores[:3], False, r"gave advantages of shape \[3\], expected \[4, 3\] or \[4\]"),
            (lambda inputs: inputs.rewards[:, :2], False, r"gave advantages of shape \[4, 2\], expected"),
            (lambda inputs: inputs.mask, False, "gave a tensor of bool as advantages, expected a floating tensor"),
            (lambda inputs: inputs.scores.tolist(), False, "gave a list as advantages, expected a floating tensor"),
            (lambda inputs: (inputs.scores, inputs.scores), False, "gave a tuple of 2 as advantages"),
            (lambda inputs: inputs.scores / 0, False, r"gave advantages that aren't finite.*\(response 1, 2, 3, 4\)"),
            (lambda inputs: inputs.rewards, True, "gave a tensor of float32, expected a pair, advantages and returns"),
            (lambda inputs: (inputs.rewards, inputs.scores), True, r"gave returns of shape \[4\], expected \[4, 3\]"),
            (lambda inputs: (inputs.scores, None), True, "gave None as returns"),
            (lambda inputs: 1 / 0, False, "marl_advantage failed: ZeroDivisionError"),
        ],
    )
    def test_anything_else_is_refused_by_name(self, estimate: Any, values: bool, message: str) -> None:
        with pytest.raises(PluginError, match=rf"(?s)Own of tests\.unit\.test_advantages.*{message}"):
            by(estimate, values)

    def test_it_is_not_blamed_for_numbers_that_it_was_given(self) -> None:
        broken = ScoredRollout(ROLLOUT, torch.zeros(MASK.shape), None, None, SCORES / 0)
        found = estimate_advantages(broken, ppo(advantage=Own.of(lambda inputs: inputs.scores)))
        assert not bool(found.advantages[MASK].isfinite().any())


class TestKL:
    def test_in_the_loss_it_is_not_in_the_rewards(self) -> None:
        options = {"advantage": "rloo", "samples_per_prompt": 2, "kl": {"coef": 1.0, "into": "loss", "estimator": "k3"}}
        found = estimate_advantages(scored(torch.ones(MASK.shape)), ppo(**options))
        assert float(found.rewards.sum()) == pytest.approx(float(SCORES.sum()))
        assert found.kl[MASK].tolist() == pytest.approx([0.3678794] * 9)  # r = e^-1: e^-1 - 1 + 1

    def test_the_adaptive_coefficient_replaces_the_configured_one(self) -> None:
        found = estimate_advantages(
            scored(torch.ones(MASK.shape), torch.zeros(MASK.shape)), ppo(kl={"coef": 0.5}), kl_coef=2.0
        )
        assert found.rewards[0].tolist() == [-2.0, -2.0, 2.0]

    def test_without_a_reference_it_is_zero(self) -> None:
        found = estimate_advantages(scored(None, torch.zeros(MASK.shape)), ppo(kl={"coef": 0.0}))
        assert torch.count_nonzero(found.kl) == 0

    def test_garbage_under_the_mask_changes_nothing(self) -> None:
        good = scored(torch.ones(MASK.shape), torch.zeros(MASK.shape))
        dirty = [
            t.masked_fill(~MASK, float("nan")) for t in (good.logprobs, good.ref_logprobs, good.values) if t is not None
        ]
        expected = estimate_advantages(good, ppo())
        found = estimate_advantages(ScoredRollout(ROLLOUT, dirty[0], dirty[1], dirty[2], SCORES), ppo())
        for name in ("kl", "rewards", "advantages", "returns"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
