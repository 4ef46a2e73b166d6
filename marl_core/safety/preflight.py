"""Step-0 checks on real prompts: is the reference the model the policy starts from, is frozen frozen, how far does a first step go, are
the moved policy's log-probs the same however they are computed, does its file hold it, does the reward fit. Seconds, always on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from marl_core.artifacts.adapter_kinds import known_kind
from marl_core.bank.adapters import AdapterBank
from marl_core.bank.views import View
from marl_core.errors import ConfigError, PluginError
from marl_core.plan.plan import Plan
from marl_core.ppo.objectives import masked_mean, masked_sum
from marl_core.ppo.roles import Roles
from marl_core.ppo.sampling.sampler import PolicySampler
from marl_core.ppo.scoring import reference_logprobs
from marl_core.ppo.seeds import derive_seed, seeded
from marl_core.ppo.step import Step
from marl_core.ppo.types import Prompts, Rollout
from marl_core.registry.raised_from import OURS
from marl_core.safety.adapter_file import file_check
from marl_core.safety.findings import Preflight, PreflightCheck
from marl_core.safety.first_step import moved_policy, step_check, training_pass
from marl_core.safety.gradient_check import reaches
from marl_core.safety.moved_checks import batch_check, packed_check, ratio_check, sampled_check

SAMPLED_TOKENS = 16
"""Most tokens of each response that the checks look at."""
MOVED_ROWS, MOVED_TOKENS = 4, 8
"""The same for the policy that has moved, which is looked at in many ways: the first rows, and how many tokens it samples to each."""
ROUNDED_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}
"""Mean |difference| in nats per token that is rounding: of a reference whose weights aren't in the bank, whose kernels round otherwise,
and of a policy whose kind of adapter starts as the base to rounding alone."""


def preflight(
    plan: Plan,
    step: Step,
    prompts: Prompts,
    gradient: PreflightCheck,
    optimizer: torch.optim.Optimizer,
    *,
    fresh: bool = True,
    ask_rewards: bool = True,
) -> Preflight:
    """Run all checks on the first prompts, as many as one pass takes.

    ConfigError, NumericError or PluginError when training would be wrong. `gradient`: the gradient check's
    result. The policy is moved by a first step of `optimizer`, looked at and put back (first_step.py). `fresh` is false after a resume:
    then the policy has moved already and is not compared with the reference. `ask_rewards` is false
    where scores are brought by hand: rewards and judges may need columns that such prompts haven't.
    """
    bank, seed = step.bank, derive_seed(plan.config.run.seed, "preflight")
    checks = [_trainable(step)]  # before any pass, which tampered weights may end in words of torch's own
    some = prompts.select(slice(0, plan.config.ppo.microbatch or plan.config.ppo.minibatch))
    limits = torch.full((len(some),), SAMPLED_TOKENS)
    rollout = step.sampler(some, seed, limits=limits)
    rollout = replace(rollout, behavior=None)  # the passes are what is checked, not what sampling said
    logprobs = step.policy_output(rollout, step.budget.train).logprobs
    checks += [_reference(plan, step, rollout, logprobs)] if fresh and plan.config.ppo.kl.coef > 0 else []
    few = slice(0, MOVED_ROWS)
    with seeded(bank.device, plan.config.run.seed, "preflight"):  # of adapters that draw, and of dropout
        checks += _moved(plan, step, rollout.select(few), logprobs[few], gradient, optimizer)
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


def _moved(
    plan: Plan,
    step: Step,
    rollout: Rollout,
    logprobs: Tensor,
    gradient: PreflightCheck,
    optimizer: torch.optim.Optimizer,
) -> list[PreflightCheck]:
    """The checks of a policy that has moved; it samples anew there, to the same prompts."""
    seed, sampler = derive_seed(plan.config.run.seed, "preflight"), step.sampler
    coarse = _precision(plan, step) != "float32" or plan.quantization.config is not None
    if isinstance(sampler, PolicySampler):
        sampler = replace(sampler, witness=True)

    def bare() -> Rollout:
        base = replace(sampler, adapter=None, value_head=None) if isinstance(sampler, PolicySampler) else sampler
        return base(rollout.prompts, seed, limits=limits)

    limits = torch.full((len(rollout),), MOVED_TOKENS)
    with moved_policy(step, rollout, logprobs, optimizer, seed=seed, coarse=coarse) as first:
        sampled = sampler(rollout.prompts, seed, limits=limits)
        scored = step.policy_output(replace(sampled, behavior=None), step.budget.train).logprobs
        trained = training_pass(step, sampled, seed)
        checks = [
            ratio_check(plan, step, scored, trained.logprobs),
            reaches(gradient, trained.gradients),
            step_check(first, plan.config.ppo.learning_rate),
            batch_check(plan, step, sampled, scored),
            packed_check(plan, step, sampled, scored),
            sampled_check(plan, step, sampled, scored, bare),
            file_check(step, sampled),
        ]
    return [check for check in checks if check is not None]


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


def _describe_start(plan: Plan, bank: AdapterBank, trained: str) -> str:
    base = f"the base prepared by {bank.prepared.split()[0]}" if bank.prepared else "the base"
    policy = plan.config.policy
    if policy.start == "continue":
        return f"a trainable copy of {policy.source} on {base}"
    config = bank.config(trained)
    return f"a new {known_kind(config.peft_type, vars(config)).title} on {base}"


def _describe_reference(roles: Roles) -> str:
    if not isinstance(roles.reference, View):
        return "weights held elsewhere"
    return (
        f"the frozen adapter {roles.reference.adapter!r}" if roles.reference.adapter else "the bare base, adapters off"
    )


def _reference(plan: Plan, step: Step, rollout: Rollout, policy: Tensor) -> PreflightCheck:
    """KL(policy, reference) before any update: zero, or the reference is another model than the policy's start."""
    bank, roles, limits = step.bank, step.roles, step.budget.train
    reference = reference_logprobs(bank, roles.reference, rollout, step.temperature, limits, roles.reference_origin)
    gap = policy - reference
    kl = float(masked_sum(gap, rollout.mask, dim=1).mean())
    worst, mean = float(gap.abs().max()), float(masked_mean(gap.abs(), rollout.mask))
    numbers = {"kl_nats": kl, "max_difference": worst, "mean_difference": mean}
    what = f"policy: {_describe_start(plan, bank, roles.trained.policy)}; reference: {_describe_reference(roles)}"
    if worst == 0.0:
        return PreflightCheck("reference", True, f"{what}; step-0 KL is bitwise 0", numbers)
    rounded = plan.policy_adapter is not None and plan.policy_adapter.start == "rounded"
    exact = isinstance(roles.reference, View) and not rounded
    allowed = 0.0 if exact else ROUNDED_TOLERANCE[_precision(plan, step)]
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
            "a new adapter (merged-base with policy.start: new)."
        )
    return "A new adapter starts as its base: use the base with adapters off as reference (disabled-adapter, or merged-base after an SFT)."


def _precision(plan: Plan, step: Step) -> str:
    return step.bank.trunk.precision_of(plan.config.model.dtype)
