"""What must hold of the policy once it has moved: two ways to compute its log-probs give the same numbers.

Each check compares the pass that scores with another one: the pass that trains, each row alone, rows padded instead of packed, and
what sampling saw with its cache. In float32 they agree to rounding, or the adapter (or the model) is none that PPO can train.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marl_core.bank.views import View
from marl_core.errors import NumericError
from marl_core.plan.plan import Plan
from marl_core.ppo.budget import PassLimits
from marl_core.ppo.scoring import view_output
from marl_core.ppo.step import Step
from marl_core.ppo.types import Rollout
from marl_core.safety.findings import PreflightCheck

EXACT_NATS = 1e-4
"""Nats that a token's log-prob may differ by where products are float32's. Rounding makes 1e-6 on tiny models and 2e-5 on real ones; an
adapter that looks at other tokens makes 1e-2 on a policy that has moved by 0.1."""
WORST_EXACT_NATS = 1e-2
"""The same where the bare base differs as much: then it is the base's rounding, up to here."""
COARSE_NATS = 0.5
"""Nats that it may differ by in half precision or on a quantized base before we warn (bfloat16 on a 135M model: 0.2)."""
COARSE_RATIO = 0.35
"""Distance from 1 that a ratio may have there."""
BASE_FACTOR = 3.0
"""How many times the bare base's own difference is still the base's doing."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One comparison: its name in preflight.json, what it compares, and whose fault a difference is."""

    name: str
    what: str
    """What two things are compared, before `differ by at most`."""
    base_fault: str
    """What is wrong and what to do, where the bare base differs too."""
    adapter_fault: str
    """The same where it doesn't."""


BATCH = Compared(
    "batch",
    "each row alone and in its batch",
    "rows see each other, or padding is seen. Set speed.pack: false; if that doesn't help, this model can't be used",
    "its layers look at other rows, at padding or at later tokens (a router that averages over the sequence does), so it is no policy "
    "whose tokens can be sampled one after the other",
)
PACKED = Compared(
    "packed",
    "packed and padded rows",
    "packed rows see each other. Set speed.pack: false",
    "its layers look at other tokens than attention lets a token see, so packed rows see each other",
)
SAMPLED = Compared(
    "sampled",
    "log-probs as sampled and as scored",
    "the model computes other numbers with its cache. Set speed.decode: transformers; if that doesn't help, this model can't be used",
    "with a cache its layers see other tokens than in a whole pass, or its weights are merged wrongly for sampling (then "
    "speed.merge_for_sampling: false helps), so responses come from another policy than the one that is trained",
)


def compare(
    plan: Plan, step: Step, compared: Compared, gap: float, base_gap: Callable[[], float], invariant: bool = True
) -> PreflightCheck:
    """A check's result from the largest difference of a token's log-prob, in nats; `base_gap` measures it on the bare base.

    NumericError in float32 when it is more than rounding.
    """
    precision, quantized = step.bank.trunk.precision_of(plan.config.model.dtype), plan.quantization.config is not None
    said = f"{compared.what} differ by at most {gap:.2g} nats"
    numbers = {"max_difference": gap}
    if precision == "float32" and not quantized:
        if not gap <= EXACT_NATS:
            _refuse(compared, gap, base_gap())
        return PreflightCheck(compared.name, True, said, numbers)
    ok = gap <= COARSE_NATS and invariant
    if not ok:
        said += (
            ": log-probs depend on how they are computed, so ratios are noisy; for int8 set quantization.threshold: 0"
        )
    elif gap > WORST_EXACT_NATS and precision != "float32":
        said += f", which is normal for {precision}"
    return PreflightCheck(compared.name, ok, said, numbers)


def _refuse(compared: Compared, gap: float, base: float) -> None:
    """NumericError for a difference in float32, unless it is small and the bare base's own."""
    of_base = gap <= BASE_FACTOR * base
    if of_base and gap <= WORST_EXACT_NATS:
        return
    whose = (
        f"and those of the bare base by {base:.2g}, although it is float32: {compared.base_fault}."
        if of_base
        else f"once the policy's adapter has learned something; those of the bare base by {base:.2g}. That is the adapter's kind: "
        f"{compared.adapter_fault}. Use another kind, e.g. lora."
    )
    raise NumericError(f"pre-flight: {compared.what} differ by up to {gap:.2g} nats a token, {whose}")


def largest(one: Tensor, other: Tensor) -> float:
    """Largest |difference| of two [B, T]; infinite for NaN."""
    return float((one - other).abs().nan_to_num(torch.inf).max())


# -- the comparisons ------------------------------------------------------------------------------------------------------


def ratio_check(plan: Plan, step: Step, scored: Tensor, trained: Tensor) -> PreflightCheck:
    """The ratio of the first minibatch: the pass that trains against the pass that scores, same weights, so one. [B, T] each.

    NumericError when it is more than rounding, unless the adapter has dropout.
    """
    error = float((torch.exp(trained - scored) - 1).abs().nan_to_num(torch.inf).max())
    detail = (
        "ratio on the first minibatch is bitwise 1"
        if error == 0
        else f"ratio on the first minibatch is off by up to {error:.2g}"
    )
    exact = step.bank.trunk.precision_of(plan.config.model.dtype) == "float32"
    allowed = EXACT_NATS if exact and plan.quantization.config is None else COARSE_RATIO
    if not error <= allowed and plan.config.policy.dropout == 0:
        raise NumericError(
            f"pre-flight: {detail}: the pass that trains doesn't compute what the pass that scores does, so PPO's ratio is noise. "
            "Usual causes: an adapter that draws at random while it trains (PVeRA, MonteCLoRA: use vera or lora), kernels that differ "
            "between train and eval mode, or a base that isn't deterministic."
        )
    return PreflightCheck("ratio", error < EXACT_NATS or not exact, detail, {"max_error": error})


def batch_check(plan: Plan, step: Step, rollout: Rollout, scored: Tensor) -> PreflightCheck:
    """How much any row's log-probs depend on the other rows of its batch, whichever stand before it."""
    found = largest(scored, _logprobs(step, rollout, step.roles.trained.policy, rows=1))

    def base() -> float:
        return largest(_logprobs(step, rollout, None), _logprobs(step, rollout, None, rows=1))

    return compare(plan, step, BATCH, found, base, invariant=plan.quantization.batch_invariant)


def packed_check(plan: Plan, step: Step, rollout: Rollout, scored: Tensor) -> PreflightCheck | None:
    """Packed rows against padded ones; None where this run packs none."""
    options = step.budget.train.options
    if options is None or not (options.pack and step.bank.trunk.packs) or bool(rollout.sequence_mask.all()):
        return None
    found = largest(scored, _logprobs(step, rollout, step.roles.trained.policy, pack=False))

    def base() -> float:
        return largest(_logprobs(step, rollout, None), _logprobs(step, rollout, None, pack=False))

    return compare(plan, step, PACKED, found, base)


def sampled_check(
    plan: Plan, step: Step, rollout: Rollout, scored: Tensor, bare: Callable[[], Rollout]
) -> PreflightCheck | None:
    """What sampling saw by its cache against the pass that scores; None where the sampler doesn't tell. `bare` samples from the base."""
    if rollout.behavior is None:
        return None

    def base() -> float:
        sampled = bare()
        if sampled.behavior is None:
            return 0.0
        return largest(sampled.behavior.logprobs, _logprobs(step, sampled, None))

    return compare(plan, step, SAMPLED, largest(rollout.behavior.logprobs, scored), base)


def _logprobs(
    step: Step, rollout: Rollout, adapter: str | None, *, rows: int | None = None, pack: bool | None = None
) -> Tensor:
    """The log-probs [B, T] of a scoring pass through `adapter`, at most `rows` at a time, packed or not; as the run does where None."""
    limits = step.budget.train if rows is None else PassLimits(rows, options=step.budget.train.options)
    if pack is not None and limits.options is not None:
        limits = replace(limits, options=replace(limits.options, pack=pack))
    return view_output(step.bank, View(adapter), rollout, step.temperature, limits).logprobs
