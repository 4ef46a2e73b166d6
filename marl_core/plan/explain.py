"""A plan in words: what is held in memory once, what twice, and which reference applies and why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from marl_core.artifacts.model_files import read_model
from marl_core.errors import DataError
from marl_core.plan.describe import adapter_options, mismatch, path_options, where
from marl_core.registry.strategy import Strategy

if TYPE_CHECKING:
    from marl_core.plan.plan import Plan


def explain(plan: Plan) -> list[str]:
    """A few sentences for `marl check`. Reads config files and headers at most."""
    return [_once(plan), *_beside(plan), _reference(plan)]


def unseen(plan: Plan) -> str | None:
    """What could not be checked because the hub model isn't on this machine, and how to have it; None when it is here."""
    model = plan.config.model
    if os.path.isdir(os.path.expanduser(model.path)):
        return None
    try:
        files = read_model(model.path, model.revision)
        if files is not None and files.shapes():
            return None
    except DataError:
        pass  # a cache without the weights
    revision = f" --revision {model.revision}" if model.revision else ""
    return (
        f"model.path: {model.path!r} isn't on this machine yet, so what needs the model's files was not checked: LoRA targets, shapes of "
        f"adapters and heads, stop tokens, its length, memory. `marl run` downloads it; to check now, `hf download {model.path}{revision}` "
        "first, or give a folder."
    )


def _once(plan: Plan) -> str:
    """Who looks through the one base."""
    roles = ["policy"]
    roles += ["reference"] if plan.config.ppo.kl.coef > 0 and not own_model(plan.reference) else []
    scorers = [(f"reward {choice.name or choice.label}", strategy) for choice, strategy in plan.rewards]
    roles += [name for name, strategy in scorers if adapter_options(strategy)]
    roles += ["value"] if plan.config.value_on != "none" else []
    adapters = sum(bool(adapter_options(strategy)) for _, strategy in scorers) + 1 + (plan.config.value_on == "own")
    how = f"{plan.config.model.dtype}, quantization {plan.config.quantization.label}"
    return (
        f"In memory once: {plan.config.model.path} ({how}). {_listed(roles)} look{'s' if len(roles) == 1 else ''} through it, "
        f"told apart by {adapters} adapter{'s' if adapters > 1 else ''} and small heads, which are float32."
    )


def _beside(plan: Plan) -> Iterator[str]:
    """Whole models beside the base, and the base twice while it is prepared."""
    named = [("the reference", plan.reference)] if plan.config.ppo.kl.coef > 0 else []
    named += [(f"reward {choice.name or choice.label}", strategy) for choice, strategy in plan.rewards]
    named += [(f"judge {name}", strategy) for name, (_, strategy) in plan.judges.items()]
    models = [(name, path) for name, strategy in named if (path := own_model(strategy))]
    if models:
        yield "Beside it, whole models of their own: " + "; ".join(f"{name} ({path})" for name, path in models) + "."
    else:
        yield "Nothing is held twice: no role has a model of its own."
    if plan.hooks.implements(plan.reference, "marl_prepare_base") and plan.config.model.dtype != "float32":
        yield "While it is loaded, the base is there twice for a moment: it is prepared in float32, then cast or quantized."


def _reference(plan: Plan) -> str:
    """Which weights the KL penalty pulls towards, and why these are right or not."""
    label = plan.config.reference.label
    if plan.config.ppo.kl.coef == 0:
        return "No reference applies: ppo.kl.coef is 0, so nothing pulls the policy back."
    wrong = mismatch(plan)
    if wrong:
        return f"The reference is {label}, which is not where the policy starts: {wrong}."
    source = plan.config.policy.source
    if source is not None:
        return (
            f"The reference is {label}: the policy starts as a trainable copy of {source}, and the reference is that adapter, "
            "frozen, so step-0 KL is 0."
        )
    if plan.hooks.implements(plan.reference, "marl_prepare_base"):
        merged = ", ".join(str(getattr(plan.reference, name)) for name, _ in adapter_options(plan.reference))
        return (
            f"The reference is {label}: the base with {merged or 'its preparation'} in it, seen with every adapter off. "
            "The policy is a new LoRA on just that, which starts as the identity, so step-0 KL is 0."
        )
    return (
        f"The reference is {label}: the policy is a new LoRA, which starts as the base itself; if this reference is the bare "
        "base, step-0 KL is 0. The pre-flight check measures it."
    )


def own_model(strategy: Strategy) -> str | None:
    """The option of a strategy that names a whole model on this machine, with weights; None when none does."""
    if adapter_options(strategy):
        return None
    for _, path in path_options(strategy):
        try:
            model = read_model(path, where(strategy)[0])
            if model is not None and model.shapes():
                return path
        except DataError:
            continue
    return None


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
