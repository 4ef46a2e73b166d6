"""Step-0 checks on real prompts: is the reference the model the policy starts from, is the ratio one, is frozen
frozen, does a gradient survive a rollout, does the reward fit this base. Seconds, always on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.views import View
from marl_core.errors import ConfigError, NumericError, PluginError
from marl_core.plan.plan import Plan
from marl_core.ppo.budget import PassLimits
from marl_core.ppo.objectives import masked_mean, masked_sum
from marl_core.ppo.roles import Roles
from marl_core.ppo.scoring import forward, pieces, reference_logprobs
from marl_core.ppo.seeds import derive_seed
from marl_core.ppo.step import Step
from marl_core.ppo.types import Prompts, Rollout
from marl_core.registry.raised_from import OURS
from marl_core.safety.findings import Preflight, PreflightCheck

SAMPLED_TOKENS = 16
"""Most tokens of each response that the checks look at."""
CALLABLE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}
"""Mean |difference| in nats per token allowed to a reference whose weights aren't in the bank: its kernels round otherwise."""
EXACT_ROW_TOLERANCE = 1e-2
"""Nats a row's log-prob may move with its batch where products are float32's: at most 1.4e-6 on the tiny models of
tests/unit/test_rows_alone.py; the rest is room for longer models and other kernels."""
ROW_TOLERANCE = 0.5
"""Nats a row's log-prob may move with its batch before we warn (bfloat16 on a 135M model: 0.2)."""


def preflight(
    plan: Plan,
    step: Step,
    prompts: Prompts,
    gradient: PreflightCheck,
    *,
    fresh: bool = True,
    ask_rewards: bool = True,
) -> Preflight:
    """Run all checks on the first prompts, as many as one pass takes.

    ConfigError, NumericError or PluginError when training would be wrong. `gradient`: the gradient check's
    result. `fresh` is false after a resume: then the policy has moved and is not compared with the reference. `ask_rewards` is false
    where scores are brought by hand: rewards and judges may need columns that such prompts haven't.
    """
    bank = step.bank
    checks = [_trainable(step)]  # before any pass, which tampered weights may end in words of torch's own
    some = prompts.select(slice(0, plan.config.ppo.microbatch or plan.config.ppo.minibatch))
    limits = torch.full((len(some),), SAMPLED_TOKENS)
    rollout = step.sampler(some, derive_seed(plan.config.run.seed, "preflight"), limits=limits)
    rollout = replace(rollout, behavior=None)  # the passes are what is checked, not what sampling said
    checks += [_reference(plan, step, rollout)] if fresh and plan.config.ppo.kl.coef > 0 else []
    checks += [_ratio(plan, step, rollout), gradient, _rows(plan, step, rollout)]
    if ask_rewards:  # one that can't be used should say so before anything is written
        with _said_of_preflight(len(rollout)):
            if step.roles.rewards:
                step.rewards(rollout)
            step.judge(rollout)
    checks += [
        PreflightCheck(f"reward adapter {name}", "can't verify" not in detail, detail)
        for name, detail in bank.reward_checks.items()
    ]
    checks += [
        PreflightCheck(f"adapter {name}", False, detail)
        for name, detail in bank.base_checks.items()
        if "can't verify" in detail
    ]
    return Preflight(tuple(checks))


@contextmanager
def _said_of_preflight(count: int) -> Iterator[None]:
    """A block whose plugins are asked of the check's own few responses: an error says so, for its numbers aren't those of the run."""
    try:
        yield
    except PluginError as error:
        error.args = (f"{error} (Asked by the pre-flight check, of {count} responses.)",)
        raise


def _trainable(step: Step) -> PreflightCheck:
    """Exactly the named adapters learn, in float32; everything else is frozen."""
    bank, trained = step.bank, step.roles.trained.parameters(step.bank)
    learning = {name for name, p in bank.all_parameters().items() if p.requires_grad}
    allowed = {name for adapter in bank.trainable for name in bank.parameters(adapter)}
    trained_names = {name for parameters in trained.values() for name in parameters}
    wrong = sorted(learning ^ allowed) or sorted(
        name
        for parameters in trained.values()
        for name, p in parameters.items()
        if not p.requires_grad or p.dtype != torch.float32
    )
    if wrong:
        raise ConfigError(
            f"pre-flight: the trainable set is not what the roles say; first: {wrong[:3]}. "
            "Something outside marl changed requires_grad or dtype."
        )
    counts = {role: float(sum(p.numel() for p in parameters.values())) for role, parameters in trained.items()}
    summary = ", ".join(f"{role} {int(count):,}" for role, count in counts.items())
    others = len(learning - trained_names)
    return PreflightCheck(
        "trainable",
        True,
        f"trainable parameters: {summary}; the base is frozen"
        + (f"; {others} tensors of other policies" if others else ""),
        counts,
    )


def _describe_start(plan: Plan, bank: AdapterBank) -> str:
    base = f"the base prepared by {bank.prepared.split()[0]}" if bank.prepared else "the base"
    policy = plan.config.policy
    return f"a trainable copy of {policy.source} on {base}" if policy.start == "continue" else f"a new LoRA on {base}"


def _describe_reference(roles: Roles) -> str:
    if not isinstance(roles.reference, View):
        return "weights held elsewhere"
    return (
        f"the frozen adapter {roles.reference.adapter!r}" if roles.reference.adapter else "the bare base, adapters off"
    )


def _reference(plan: Plan, step: Step, rollout: Rollout) -> PreflightCheck:
    """KL(policy, reference) before any update: zero, or the reference is another model than the policy's start."""
    bank, roles, limits = step.bank, step.roles, step.budget.train
    policy = step.policy_output(rollout, limits).logprobs
    reference = reference_logprobs(bank, roles.reference, rollout, step.temperature, limits, roles.reference_origin)
    gap = policy - reference
    kl = float(masked_sum(gap, rollout.mask, dim=1).mean())
    worst, mean = float(gap.abs().max()), float(masked_mean(gap.abs(), rollout.mask))
    numbers = {"kl_nats": kl, "max_difference": worst, "mean_difference": mean}
    what = f"policy: {_describe_start(plan, bank)}; reference: {_describe_reference(roles)}"
    if worst == 0.0:
        return PreflightCheck("reference", True, f"{what}; step-0 KL is bitwise 0", numbers)
    allowed = 0.0 if isinstance(roles.reference, View) else CALLABLE_TOLERANCE[_precision(plan, step)]
    if plan.policy_adapter is not None and plan.policy_adapter.start == "rounded":
        allowed = CALLABLE_TOLERANCE[_precision(plan, step)]  # DoRA recomputes norms: not bitwise in half precision
    if mean <= allowed:
        return PreflightCheck(
            "reference", True, f"{what}; they differ by {mean:.2g} nats per token, which is rounding", numbers
        )
    sentence = (
        f"{what}. Before any update they differ by {mean:.3g} nats per token (largest {worst:.3g}; KL {kl:.3g} nats per response): "
        f"the reference is not the model the policy starts from{_given_by(plan)}, and the KL penalty would pull towards {_pulled_to(plan)}"
    )
    if not plan.config.reference.allow_mismatch:
        raise ConfigError(
            f"pre-flight: {sentence}. {_remedy(plan)} If you mean it, set reference.allow_mismatch: true."
        )
    return PreflightCheck("reference", False, f"{sentence}; allowed by reference.allow_mismatch", numbers)


def _stranger(plan: Plan) -> str | None:
    """Who gives the reference, when that is no strategy of marl's own."""
    own = type(plan.reference).__module__.partition(".")[0] in OURS
    return None if own else plan.hooks.origin(plan.reference)


def _given_by(plan: Plan) -> str:
    stranger = _stranger(plan)
    return f" (marl_reference of {stranger} gives it)" if stranger else ""


def _pulled_to(plan: Plan) -> str:
    """What is known of the reference: of a stranger's, no more than that it is another model."""
    trap = plan.config.policy.start == "continue" and _stranger(plan) is None
    return "a model that never saw its training" if trap else "another model than that"


def _remedy(plan: Plan) -> str:
    if plan.config.policy.start == "continue":
        return (
            f"Use the frozen adapter {plan.config.policy.source} as reference (peft-adapter), or merge it into the base and train "
            "a new LoRA (merged-base with policy.start: new)."
        )
    return "A new LoRA starts as its base: use the base with adapters off as reference (disabled-adapter, or merged-base after an SFT)."


def _precision(plan: Plan, step: Step) -> str:
    return step.bank.trunk.precision_of(plan.config.model.dtype)


def _ratio(plan: Plan, step: Step, rollout: Rollout) -> PreflightCheck:
    """The ratio of the first minibatch: training pass against scoring pass, same weights, so one."""
    bank, limits = step.bank, step.budget.train
    old = step.policy_output(rollout, limits).logprobs
    with bank.using(step.roles.trained.policy, train=True, options=limits.options):
        new = torch.cat([forward(bank, piece, step.temperature).logprobs.detach() for piece in pieces(rollout, limits)])
    error = float((torch.exp(new - old) - 1).abs().max())
    detail = (
        "ratio on the first minibatch is bitwise 1"
        if error == 0
        else f"ratio on the first minibatch is off by up to {error:.2g}"
    )
    if error > 0.35 and plan.config.policy.dropout == 0:
        raise NumericError(
            f"pre-flight: {detail}: the pass that trains doesn't compute what the pass that scores does, so PPO's ratio is noise. "
            "Usual causes: kernels that differ between train and eval mode, or a base that isn't deterministic."
        )
    return PreflightCheck("ratio", error < 1e-4 or _precision(plan, step) != "float32", detail, {"max_error": error})


@torch.no_grad()
def _rows(plan: Plan, step: Step, rollout: Rollout) -> PreflightCheck:
    """How much any row's log-probs depend on the other rows of its batch, whichever stand before it.

    NumericError in float32 when it is more than rounding: then what is scored is another model.
    """
    bank, temperature = step.bank, step.temperature
    with bank.using(step.roles.trained.policy, options=step.budget.train.options):
        together = forward(bank, rollout, temperature).logprobs
        single = torch.cat([forward(bank, row, temperature).logprobs for row in pieces(rollout, PassLimits(1))])
    gaps = (together - single).abs().amax(dim=1)
    gap, row = float(gaps.max()), int(gaps.argmax()) + 1
    if gap > EXACT_ROW_TOLERANCE and _precision(plan, step) == "float32" and plan.quantization.config is None:
        raise NumericError(
            f"pre-flight: log-probs of response {row} differ by {gap:.2g} nats between its batch and the row alone, and the base is "
            "float32: rows see each other, or padding is seen. Set speed.pack: false; if that doesn't help, this model can't be used."
        )
    ok = gap <= ROW_TOLERANCE and plan.quantization.batch_invariant
    advice = ""
    if gap > EXACT_ROW_TOLERANCE and _precision(plan, step) != "float32":
        advice = f", which is normal for {_precision(plan, step)}"
    if not ok:
        advice = ": log-probs depend on the batch, so ratios are noisy; for int8 set quantization.threshold: 0"
    return PreflightCheck(
        "batch",
        ok,
        f"each row alone and in its batch differ by at most {gap:.2g} nats{advice}",
        {"max_difference": gap},
    )
