"""The contract every strategy must keep, as checks that say precisely what was broken, and how to correct it.

One function for each family, named by the family's record: `check_reward(strategy, hooks, trial)` and so on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import ValidationError

from marl_core.errors import ConfigError, MarlWarning, PluginError
from marl_core.registry.callables import without_callables
from marl_core.registry.families import Family, FamilyName, family_named
from marl_core.registry.hooks import Hooks
from marl_core.registry.strategy import Strategy, api_problem
from marl_core.testing.tiny import TEXTS, add_policy, fake_rollout, tiny_bank
from marl_core.testing.traces import Traces

if TYPE_CHECKING:
    from torch import Tensor

    from marl_core.bank.adapters import AdapterBank
    from marl_core.ppo.types import Evaluation, Rollout, ScoredRollout, StepStats
    from marl_core.registry.strategy import Estimator

RolloutFunction: TypeAlias = "Callable[[Rollout], Tensor]"
POLICY = "policy"
ALONE_TOLERANCE_NATS = 1e-3
"""Nats that a response's log-prob may differ alone and in its batch, float32 on the tiny model."""
MAY_CHANGE_WHILE_BUILT = (
    "the adapters in the bank",
    "torch's random state",
    "Python's random state",
    "numpy's random state",
)
"""What building a reward or reference may change: it loads adapters, and libraries draw numbers while they load."""


@dataclass(frozen=True)
class Trial:
    """What a strategy is tried on: a bank and a rollout, the tiny model's where none was given."""

    given_bank: AdapterBank | None = None
    given_rollout: Rollout | None = None
    rows: Sequence[Mapping[str, Any]] = ()

    @cached_property
    def bank(self) -> AdapterBank:
        """The shared base, without any policy so far."""
        return self.given_bank or tiny_bank()

    @cached_property
    def rollout(self) -> Rollout:
        """The rollout that was given, or responses to the rows: one to each, at least three."""
        if self.given_rollout is not None:
            return self.given_rollout
        texts, rows = [*TEXTS], [*self.rows]
        count = max(len(rows), len(texts)) if rows else len(texts)
        pairs = [texts[i % len(texts)] for i in range(count)]
        if not rows:
            return fake_rollout(pairs, tokenizer=self.bank.tokenizer)
        of_data = [rows[i % len(rows)] for i in range(count)]
        prompts = [row.get("prompt") for row in of_data]
        asked = [
            (prompt if isinstance(prompt, str) else own, response)
            for prompt, (own, response) in zip(prompts, pairs, strict=True)
        ]
        return fake_rollout(asked, of_data, self.bank.tokenizer)

    @property
    def has_columns(self) -> bool:
        """Whether the rollout's rows hold columns of data."""
        return any(self.rollout.prompts.rows)


def check_strategy(
    family: FamilyName,
    strategy: Strategy,
    bank: AdapterBank | None = None,
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    rollout: Rollout | None = None,
) -> None:
    """Hold a strategy to its family's contract; AssertionError or PluginError says precisely what it broke.

    Of every strategy: a class docstring; each option described, kept by JSON and back, unknown options refused; hooks that
    exist, with arguments they have; the family's hook there; state that can be taken back. Of an observer: `marl_run_failed`
    bears being called without `marl_run_start`; where it has no `marl_run_start`, it is told
    of a step and of an evaluation, and gives None or a `StopRun`. Of a quantization: a `Quantization`. Of a kind of adapter, on
    the linear layers of a tiny model (or `bank`): what it says of itself is so, a fresh one is the base and a moved one isn't, off
    is the base, a row alone or packed gets the same log-probs, a gradient reaches every learning tensor, and its file makes it
    again bit for bit. Of rewards and references, on a tiny
    model (or `bank`) and three responses: the right shape, finite, no gradient, the same answer twice, log-probs not above 0
    and the same for a response alone; after an update only adapters of its own moved; and everything else left as it was:
    active adapter, trainable set, weights, modes, tokenizer, random states, threads, default dtype. Of an advantage estimator, on
    four responses to two prompts: the right shape, finite, twice the same, what it says of itself true, and the rest left as it was.

    `rows` are rows of data for a strategy that reads columns, `rows=[{"prompt": "2 + 2", "answer": "4"}]`: the responses are to these
    prompts, and there are as many as rows, but at least three. `rollout` is a whole rollout in their place, as `fake_rollout` makes one,
    for a strategy that needs certain responses. Families that see no rollout need neither. ConfigError when both are given, or no row.
    """
    kind = family_named(family, "check_strategy")
    if rows is not None and rollout is not None:
        raise ConfigError(
            "check_strategy: rows and rollout are both given; a rollout has its own rows. Give one of them."
        )
    if rows is not None and not rows:
        raise ConfigError("check_strategy: rows is empty. Give one row of data or more, or leave it out.")
    _check_options(strategy)
    hooks = Hooks([(strategy, type(strategy).__name__)])
    _check_hooks(kind, strategy, hooks)
    contract: Callable[[Strategy, Hooks, Trial], None] = globals()[kind.contract]
    contract(strategy, hooks, Trial(bank, rollout, rows or ()))


def check_reference(strategy: Strategy, hooks: Hooks, trial: Trial) -> None:
    """Log-probs of each response, the same for a response alone."""
    from marl_core.ppo.budget import PassLimits
    from marl_core.ppo.scoring import reference_logprobs

    bank = _with_policy(trial.bank)

    def build() -> RolloutFunction:
        reference = hooks.reference(strategy, bank, 1.0, POLICY)
        return lambda rollout: reference_logprobs(bank, reference, rollout, 1.0, PassLimits(2))

    evaluate, first, rollout = _check_numbers(strategy, hooks, trial, build)
    name = type(strategy).__name__
    assert bool((first <= 0).all()), f"{name}: log-probs above 0: {float(first.max()):.3g}"
    alone = [evaluate(rollout.select(slice(i, i + 1))) for i in range(len(rollout))]
    gaps = [float((row - first[i]).abs().max()) for i, row in enumerate(alone)]
    assert max(gaps) <= ALONE_TOLERANCE_NATS, (
        f"{name}: response {gaps.index(max(gaps)) + 1} gets other log-probs alone than in its batch (by {max(gaps):.3g}): "
        "padding or the other responses take part; look at rollout.sequence_mask"
    )


def check_reward(strategy: Strategy, hooks: Hooks, trial: Trial) -> None:
    """Finite scores of each response."""
    from marl_core.ppo.budget import PassLimits
    from marl_core.ppo.rewards import score_all
    from marl_core.ppo.roles import RewardSource

    bank = _with_policy(trial.bank)

    def build() -> RolloutFunction:
        source = RewardSource(type(strategy).__name__, 1.0, hooks.reward(strategy, bank, bank.tokenizer))
        return lambda rollout: score_all(bank, [source], rollout, PassLimits(2)).total

    _check_numbers(strategy, hooks, trial, build)


def check_adapter(strategy: Strategy, hooks: Hooks, trial: Trial) -> None:
    """On all linear layers: facts that are true, a fresh one that is the base, and all that a policy relies on of a moved one."""
    import torch

    from marl_core.bank.targets import expand_targets
    from marl_core.errors import MarlError
    from marl_core.run.trained_adapters import layers_of, shapes_of
    from marl_core.testing import adapter_contract as kept

    name, bank = type(strategy).__name__, trial.bank
    taken = sorted({*type(strategy).model_fields} & {*_keys_of_sections()})
    assert not taken, f"{name}: the option {taken[0]} has the name of a key of `policy` or `value`; give it another"
    layers, shapes = layers_of(bank), shapes_of(bank)
    before = Traces.of(bank)
    adapter = hooks.adapter(strategy, layers, shapes, POLICY)
    again = hooks.adapter(strategy, layers, shapes, POLICY)
    first, second = adapter.config(), again.config()
    assert first is not second, f"{name}: Adapter.config gave the same object twice; make a new config at each call"
    assert replace(again, config=adapter.config) == adapter, (
        f"{name}: asked twice, it says other things of the same layers"
    )
    torch.manual_seed(0)
    _assert_unchanged(before, Traces.of(bank), f"{name}: marl_adapter changed", ("torch's random state",))
    base = kept.OnTrial(name, bank, adapter, trial.rollout).logprobs(None)
    targets = expand_targets("all-linear", bank.linears)
    try:
        with kept.on_trial(name, bank, adapter, trial.rollout, targets) as added:
            kept.check_facts(added)
            kept.check_start(added, base)
            added.move()
            kept.check_moved(added, base)
            kept.check_gradient(added)
            kept.check_file(added)
    except MarlError as error:
        raise AssertionError(f"{name}: it can't stand on a bank's base: {error}") from error
    _assert_unchanged(before, Traces.of(bank), f"{name}: made and removed, it changed", MAY_CHANGE_WHILE_BUILT)


def _keys_of_sections() -> Iterator[str]:
    """The keys that stand beside an adapter's options in a config."""
    from marl_core.config.run_config import PolicySection, ValueSection
    from marl_core.registry.model_keys import keys_of

    for section in (PolicySection, ValueSection):
        yield from (key for key in {*keys_of(section), *section.model_fields} if key != "options")


def check_quantization(strategy: Strategy, hooks: Hooks, trial: Trial) -> None:
    """A `Quantization`, for a dtype that every machine has."""
    hooks.quantization(strategy, "float32")


def check_advantage(strategy: Strategy, hooks: Hooks, trial: Trial) -> None:
    """Advantages of two responses to each of two prompts; an estimator that declares no need has none."""
    import torch

    name, bank = type(strategy).__name__, trial.bank
    before = Traces.of(bank)
    estimator = hooks.advantage(strategy)
    first, second = (_advantages(estimator, bank) for _ in range(2))
    assert torch.equal(first, second), f"{name}: two calls on the same rewards gave different advantages"
    _assert_unchanged(before, Traces.of(bank), f"{name}: it changed")
    if not estimator.uses_token_rewards:
        assert torch.equal(first, _advantages(estimator, bank, early=True)), (
            f"{name}: its advantages depend on which token a reward stands on; say so: Estimator(..., uses_token_rewards=True)"
        )
    if not estimator.needs_groups:
        _advantages(estimator, bank, samples_per_prompt=1)


def check_observer(strategy: Strategy, hooks: Hooks, trial: Trial) -> None:
    """It gives None or a StopRun, and `marl_run_failed` works without `marl_run_start` before it: a run may fail while its
    observers are told of the start.
    """
    if not hooks.implements(strategy, "marl_run_start"):  # what that opens may be the world's, such as a tracker's page
        hooks.step_end(*_step(trial))
        hooks.evaluation_end(_evaluation(), trial.bank, POLICY)
    if hooks.implements(strategy, "marl_state"):
        _check_state(strategy, hooks, _with_policy(trial.bank))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", MarlWarning)
            hooks.run_failed(0, RuntimeError("another observer failed"))
    except MarlWarning as error:
        raise AssertionError(
            f"{type(strategy).__name__}: marl_run_failed must bear being called without marl_run_start: {error}"
        ) from error


def _check_options(strategy: Strategy) -> None:
    kind = type(strategy)
    problem = api_problem(kind)
    assert problem is None, f"{kind.__name__}: {problem}"
    assert kind.__doc__, f"{kind.__name__} needs a docstring: its first line is shown by `marl plugins`"
    for name, option in kind.model_fields.items():
        assert option.description, f"{kind.__name__}.{name} needs a description: Field(..., description='...')"
    options, written = strategy.model_dump(), strategy.model_dump_json()
    holds_function = (
        without_callables(options) != options
    )  # its name, which is what is written, may not lead back to it
    restored = strategy if holds_function else kind.model_validate_json(written)
    assert restored.model_dump() == options, (
        f"{kind.__name__}: its options change when written to JSON and read back: {written} became {restored.model_dump_json()}"
    )
    try:
        kind.model_validate({**strategy.model_dump(), "no_such_option": 1})
    except ValidationError:
        return
    raise AssertionError(
        f"{kind.__name__} takes options it doesn't have: keep extra='forbid', so that a misspelt one is said"
    )


def _check_hooks(family: Family, strategy: Strategy, hooks: Hooks) -> None:
    name, required = type(strategy).__name__, family.required_hook
    assert required is None or hooks.implements(strategy, required), (
        f"{name} has no {required} hook, which family {family.name} needs"
    )
    keeps, takes = (hooks.implements(strategy, hook) for hook in ("marl_state", "marl_restore"))
    assert keeps == takes, (
        f"{name} has {'marl_state' if keeps else 'marl_restore'} without {'marl_restore' if keeps else 'marl_state'}: "
        "what a checkpoint keeps must be taken back on resume"
    )


@contextmanager
def _telling_of_rows(trial: Trial) -> Iterator[None]:
    """A strategy that fails for want of a key is told how it gets columns to read."""
    try:
        yield
    except PluginError as error:
        if trial.has_columns or not isinstance(error.__cause__, KeyError):
            raise
        key = error.__cause__
        raise PluginError(
            f"{error} Without rows the contract's responses have no columns; where {key} is one, give it: "
            f"check_strategy(..., rows=[{{{key}: ...}}])."
        ) from key


def _with_policy(bank: AdapterBank) -> AdapterBank:
    if POLICY not in bank.adapters:
        add_policy(bank, POLICY)
    return bank


def _check_numbers(
    strategy: Strategy, hooks: Hooks, trial: Trial, build: Callable[[], RolloutFunction]
) -> tuple[RolloutFunction, Tensor, Rollout]:
    """What a reward and a reference have in common. Returns the function, what it gives for a rollout, and that rollout."""
    import torch

    name, bank, rollout = type(strategy).__name__, trial.bank, trial.rollout
    others, before_all = {*bank.adapters}, Traces.of(bank)
    evaluate = build()
    _assert_unchanged(before_all, Traces.of(bank), f"{name}: while it was built, it changed", MAY_CHANGE_WHILE_BUILT)
    before = Traces.of(bank)
    with _telling_of_rows(trial):
        first, second = evaluate(rollout), evaluate(rollout)
    assert torch.equal(first, second), f"{name}: two calls on the same rollout gave different numbers"
    assert not first.requires_grad, f"{name}: its result requires grad; compute it under torch.no_grad()"
    _assert_unchanged(before, Traces.of(bank), f"{name}: its call changed")
    assert bool(first.isfinite().all()), f"{name}: gave a number that isn't finite"
    _check_update_end(strategy, hooks, bank, {*bank.adapters} - others - {*bank.paths})
    return evaluate, first, rollout


def _advantages(estimator: Estimator, bank: AdapterBank, early: bool = False, samples_per_prompt: int = 2) -> Tensor:
    """Advantages [4, T] as a step asks for them; `early`: half of each score stands on the response's first token."""
    import torch

    from marl_core.config.run_config import PPOSection
    from marl_core.ppo.estimators import estimate_advantages
    from marl_core.ppo.types import ScoredRollout

    rollout = fake_rollout([("A", " film"), ("A", "!"), ("B", " good one"), ("B", "")], tokenizer=bank.tokenizer)
    scores, zero = torch.tensor([1.0, -2.0, 4.0, 0.5]), torch.zeros(rollout.ids.shape)
    on_tokens = zero.clone()
    on_tokens[:, 0] = scores / 2
    values = zero + 0.25 if estimator.needs_values else None
    scored = ScoredRollout(rollout, zero, None, values, scores, token_scores=on_tokens if early else None)
    ppo = PPOSection(batch=4, minibatch=4, samples_per_prompt=samples_per_prompt)
    return estimate_advantages(scored, ppo, estimator=estimator).advantages


def _step(trial: Trial) -> tuple[StepStats, ScoredRollout]:
    """A step as an observer is told of it, with every metric that marl has."""
    import torch

    from marl_core.ppo.metrics import step_stats
    from marl_core.ppo.types import Advantages, ScoredRollout, UpdateStats

    rollout = trial.rollout
    zero, scores = torch.zeros(rollout.ids.shape), torch.linspace(0.0, 1.0, len(rollout))
    scored = ScoredRollout(rollout, zero, zero, zero, scores, {"reward": scores}, zero)
    update = UpdateStats(**{field.name: 0.0 for field in fields(UpdateStats)})
    return step_stats(1, scored, Advantages(zero, zero, zero, zero), update, 0.05, {"rollout": 1.0}), scored


def _evaluation() -> Evaluation:
    from marl_core.ppo.types import Evaluation

    return Evaluation(1, 0.5, 0.0, 0.1, 0.0, 8.0, 0.0, 0.5, {}, ())


def _check_update_end(strategy: Strategy, hooks: Hooks, bank: AdapterBank, own: set[str]) -> None:
    """`marl_update_end` writes to no weights but those of the adapters `own`, which the strategy added for itself."""
    before = Traces.of(bank, without=own)
    hooks.update_end(1, bank, POLICY)
    after = Traces.of(bank, without=own)
    _assert_unchanged(
        before, after, f"{type(strategy).__name__}: marl_update_end may write to adapters of its own only, it changed"
    )
    _check_state(strategy, hooks, bank)


def _check_state(strategy: Strategy, hooks: Hooks, bank: AdapterBank) -> None:
    """`marl_state` gives what `marl_restore` was given."""
    import torch

    state = {name: tensor.detach().clone() for name, tensor in hooks.state(strategy, bank, POLICY).items()}
    if not state:
        return
    hooks.update_end(1, bank, POLICY)
    hooks.restore(strategy, state, bank, POLICY)
    restored = hooks.state(strategy, bank, POLICY)
    differing = [name for name in state if name not in restored or not torch.equal(restored[name], state[name])]
    assert not differing, (
        f"{type(strategy).__name__}: after marl_restore, marl_state gives another {differing[0]!r} than was restored"
    )


def _assert_unchanged(before: Traces, after: Traces, sentence: str, allowed: tuple[str, ...] = ()) -> None:
    changed = [what for what in before.changed(after) if not what.startswith(allowed)]
    assert not changed, f"{sentence} {'; '.join(changed)}"
