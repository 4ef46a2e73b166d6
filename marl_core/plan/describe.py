"""Who is who in a run: each role, where its weights live, and which reference is the right one for this policy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from marl_core.artifacts.adapter_files import CONFIG_FILE
from marl_core.artifacts.hub import adapter_folder, is_hub_adapter
from marl_core.config.choice import RewardChoice
from marl_core.registry.strategy import Strategy

if TYPE_CHECKING:
    from marl_core.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Role:
    """One row of `marl check`: who, which weights, and what follows."""

    name: str
    weights: str
    note: str


def describe_roles(plan: Plan) -> list[Role]:
    """Rows for base, policy, reference, rewards, value and judges."""
    config = plan.config
    model = config.model
    base = f"{model.path}, {model.dtype}, quantization {config.quantization.label}"
    rewards = [
        _scorer(f"reward {choice.name or choice.label}", choice, strategy, plan.hooks.describe(strategy, plan))
        for choice, strategy in plan.rewards
    ]
    judges = [
        Role(f"judge {name}", summary(type(strategy)), "measured on held-out prompts, never trained on")
        for name, (_, strategy) in plan.judges.items()
    ]
    return [
        Role("base", base, "frozen, in memory once"),
        _policy(plan),
        Role("reference", f"{config.reference.label}: {summary(type(plan.reference))}", _reference_note(plan)),
        *rewards,
        _value(plan),
        *judges,
    ]


def mismatch(plan: Plan) -> str | None:
    """Why the reference isn't the model the policy starts from, as far as options show; None if it is, or may be."""
    if plan.hooks.describe(plan.reference, plan) is not None:
        return None  # it speaks for itself
    source = plan.config.policy.source
    adapters = [str(getattr(plan.reference, name)) for name, _ in adapter_options(plan.reference)]
    prepares = plan.hooks.implements(plan.reference, "marl_prepare_base")
    if source is None:
        if adapters and not prepares:
            return (
                f"the policy starts as the base, the reference is the adapter {adapters[0]}: KL pulls towards "
                "another model than the start. Let the policy continue that adapter, or merge it into the base"
            )
        return None
    if prepares and adapters:
        return (
            f"the policy continues {source} on a base that already has {adapters[0]} merged in. Start a new one there"
        )
    revision, _ = where(plan.reference)
    if is_hub_adapter(source) and adapters and revision != plan.config.policy.revision:
        return (
            f"the policy continues {source} at revision {plan.config.policy.revision or 'main'}, the reference is at revision "
            f"{revision or 'main'}. Name the same revision in both"
        )
    if not any(_same(source, path) for _, path in path_options(plan.reference)):
        return (
            f"the policy continues {source}, which the reference doesn't name: KL pulls towards a model that never "
            "saw its training data. Use a reference that is this adapter, frozen"
        )
    return None


WHERE = ("revision", "subfolder")
"""Options that say where inside another option's repository or folder; no paths of their own."""


def path_options(strategy: Strategy) -> Iterator[tuple[str, str]]:
    """The strategy's options that may be paths."""
    for name in type(strategy).model_fields:
        if name in WHERE:
            continue
        value = getattr(strategy, name)
        if isinstance(value, str | os.PathLike):
            yield name, os.path.expanduser(os.fspath(value))


def where(strategy: Strategy) -> tuple[str | None, str | None]:
    """Its revision and its subfolder, where it has such options."""
    revision, subfolder = (getattr(strategy, name, None) for name in WHERE)
    return revision if isinstance(revision, str) else None, subfolder if isinstance(subfolder, str) else None


def adapter_options(strategy: Strategy) -> list[tuple[str, str]]:
    """Those options that name an adapter on this machine, with its folder: of a hub name the snapshot in the cache."""
    folders = [(name, adapter_folder(path, *where(strategy))) for name, path in path_options(strategy)]
    return [(name, folder) for name, folder in folders if folder and os.path.isfile(os.path.join(folder, CONFIG_FILE))]


def summary(strategy_class: type[Strategy]) -> str:
    """The first line of its docstring; empty when it has none of its own."""
    text = strategy_class.__doc__ if "__doc__" in vars(strategy_class) else None
    return (text or "").strip().split("\n", 1)[0].rstrip(".")


def _same(one: str, other: str) -> bool:
    return os.path.realpath(os.path.expanduser(one)) == os.path.realpath(os.path.expanduser(other))


def _policy(plan: Plan) -> Role:
    policy = plan.config.policy
    if policy.source is not None:
        return Role("policy", f"LoRA on the base, a trainable copy of {policy.source}", "starts as that adapter")
    targets = policy.targets if isinstance(policy.targets, str) else ", ".join(policy.targets)
    return Role("policy", f"LoRA on the base: r={policy.r}, alpha={policy.alpha:g}, {targets}", "starts as the base")


def _reference_note(plan: Plan) -> str:
    if plan.config.ppo.kl.coef == 0:
        return "not evaluated: ppo.kl.coef is 0"
    own_words = plan.hooks.describe(plan.reference, plan)
    if own_words is not None:
        return own_words
    wrong = mismatch(plan)
    if wrong:
        return f"not where the policy starts: {wrong}"
    if plan.config.policy.source is not None:
        return "the frozen adapter that the policy continues: step-0 KL is 0"
    if plan.hooks.implements(plan.reference, "marl_prepare_base"):
        return "the base as this strategy prepares it, where the new policy starts: step-0 KL is 0"
    return "right if it is the bare base, where the new policy starts; the pre-flight check measures it"


def _scorer(name: str, choice: RewardChoice, strategy: Strategy, own_words: str | None) -> Role:
    return Role(name, own_words or summary(type(strategy)) or choice.label, f"weight {choice.weight:g}")


def _value(plan: Plan) -> Role:
    advantage = plan.config.ppo.advantage
    weights, note = {
        "policy": ("a head on the policy's trunk", "no forward pass of its own"),
        "own": (f"LoRA on the base and a head: r={plan.config.value.r}", "a forward and backward pass of its own"),
        "none": ("none", f"advantage {advantage} needs no value function"),
    }[plan.config.value_on]
    return Role("value", weights, note)
