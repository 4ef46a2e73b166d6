"""A plan in words: who is who, what is held in memory once and what twice, and which reference applies and why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from marl_core.artifacts.adapter_files import read_adapter
from marl_core.artifacts.hub import adapter_folder, is_hub_adapter
from marl_core.artifacts.model_files import read_model
from marl_core.config.choice import RewardChoice
from marl_core.config.redact import redacted
from marl_core.errors import DataError, MarlError
from marl_core.plan.chosen import Chosen
from marl_core.plan.named_paths import (
    adapter_options,
    is_adapter_option,
    not_here,
    own_model,
    path_options,
    revision_and_subfolder,
)
from marl_core.registry.callables import without_callables
from marl_core.registry.strategy import Adapter, Strategy


@dataclass(frozen=True, slots=True)
class Role:
    """One row of `marl check`: who, which weights, and what follows."""

    name: str
    weights: str
    note: str


def describe_roles(plan: Chosen) -> list[Role]:
    """Rows for base, policy, reference, rewards, value, judges and observers."""
    config = plan.config
    model = config.model
    base = f"{model.path}, {model.dtype}, quantization {config.quantization.label}"
    rewards = [
        Role(f"reward {choice.name or choice.label}", _scored_by(plan, choice, strategy), f"weight {choice.weight:g}")
        for choice, strategy in plan.rewards
    ]
    rewards = rewards or [Role("reward", "none", "scores are brought by hand: runner.step(rollout=..., scores=...)")]
    judges = [
        Role(f"judge {name}", _scored_by(plan, choice, strategy), "measured on held-out prompts, never trained on")
        for name, (choice, strategy) in plan.judges.items()
    ]
    return [
        Role("base", base, "frozen, in memory once"),
        _policy(plan),
        Role("reference", f"{config.reference.label}: {_in_general(plan.reference)}", _reference_note(plan)),
        *rewards,
        _value(plan),
        *judges,
        _observers(plan),
    ]


def mismatch(plan: Chosen) -> str | None:
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
    revision, _ = revision_and_subfolder(plan.reference)
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


def summary(strategy_class: type[Strategy]) -> str:
    """The first line of its docstring; empty when it has none of its own."""
    text = strategy_class.__doc__ if "__doc__" in vars(strategy_class) else None
    return (text or "").strip().split("\n", 1)[0].rstrip(".")


def _same(one: str, other: str) -> bool:
    return os.path.realpath(os.path.expanduser(one)) == os.path.realpath(os.path.expanduser(other))


def _policy(plan: Chosen) -> Role:
    policy = plan.config.policy
    if policy.source is not None:
        return Role(
            "policy", f"{_continued(plan)} on the base, a trainable copy of {policy.source}", "starts as that adapter"
        )
    rounded = plan.policy_adapter is not None and plan.policy_adapter.start == "rounded"
    return Role("policy", ", ".join(_kind(plan, "policy")), f"starts as the base{', to rounding' if rounded else ''}")


def _continued(plan: Chosen) -> str:
    """The kind of the adapter that the policy continues, where its file is here."""
    policy = plan.config.policy
    folder = adapter_folder(policy.source or "", policy.revision, policy.subfolder)
    try:
        return read_adapter(folder, "policy.from").kind.title if folder is not None else "adapter"
    except DataError:
        return "adapter"


def _kind(plan: Chosen, key: str) -> Iterator[str]:
    """An adapter that is made for the run: what its strategy says of it, its targets, how many numbers learn."""
    section, strategy = plan.adapter_strategies[key]
    yield plan.hooks.describe(strategy, plan) or f"{section.label} on the base{_given(strategy)}"
    yield section.targets if isinstance(section.targets, str) else ", ".join(section.targets)
    try:
        adapter: Adapter | None = getattr(plan, f"{key}_adapter")
    except MarlError:
        return  # told as a finding
    if adapter is not None:
        yield f"{adapter.learned:,} numbers learn"


def _given(strategy: Strategy) -> str:
    """The options that somebody gave, for a strategy that doesn't speak for itself."""
    given = {name: getattr(strategy, name) for name in sorted(strategy.model_fields_set)}
    words = ", ".join(f"{name} {value}" for name, value in redacted(given).items())
    return f": {words}" if words else ""


def _reference_note(plan: Chosen) -> str:
    if plan.config.ppo.kl.coef == 0:
        return "not evaluated: ppo.kl.coef is 0"
    description = plan.hooks.describe(plan.reference, plan)
    if description is not None:
        return description
    problem = mismatch(plan)
    if problem:
        return f"not where the policy starts: {problem}"
    if plan.config.policy.source is not None:
        return "the frozen adapter that the policy continues: step-0 KL is 0"
    if plan.hooks.implements(plan.reference, "marl_prepare_base"):
        return "the base as this strategy prepares it, where the new policy starts: step-0 KL is 0"
    return "right if it is the bare base, where the new policy starts; the pre-flight check measures it"


def _scored_by(plan: Chosen, choice: RewardChoice, strategy: Strategy) -> str:
    return plan.hooks.describe(strategy, plan) or _in_general(strategy) or choice.label


def _in_general(strategy: Strategy) -> str:
    """What is said of the class, and what was chosen: the options that have no default."""
    fields = type(strategy).model_fields
    required = {name: without_callables(getattr(strategy, name)) for name in fields if fields[name].is_required()}
    chosen = ", ".join(f"{name}: {value}" for name, value in redacted(required).items())
    about = summary(type(strategy))
    return f"{about} ({chosen})" if about and chosen else about or chosen


def _value(plan: Chosen) -> Role:
    advantage = plan.config.ppo.advantage.label
    if plan.value_on == "own":
        return Role("value", ", ".join([*_kind(plan, "value"), "and a head"]), "a forward and backward pass of its own")
    weights, note = {
        "policy": ("a head on the policy's trunk", "no forward pass of its own"),
        "none": ("none", f"advantage {advantage} needs no value function"),
    }[plan.value_on]
    return Role("value", weights, note)


def _observers(plan: Chosen) -> Role:
    folder = plan.config.run.folder
    note = f"steps and samples are written into {folder}" if folder else "no run.folder: nothing is written"
    return Role("observers", ", ".join(choice.label for choice in plan.config.observers) or "none", note)


def explain(plan: Chosen) -> list[str]:
    """A few sentences for `marl check`. Reads config files and headers at most."""
    return [_shared_base(plan), *_separate_models(plan), _reference(plan)]


def unseen(plan: Chosen) -> str | None:
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
        f"model.path: {model.path!r} isn't on this machine yet, so what needs the model's files was not checked: targets, shapes of "
        f"adapters and heads, stop tokens, its length, memory. `marl run` downloads it; to check now, `hf download {model.path}{revision}` "
        "first, or give a folder."
    )


def _shared_base(plan: Chosen) -> str:
    """Who looks through the one base."""
    roles = ["policy"]
    roles += (
        ["reference"]
        if plan.config.ppo.kl.coef > 0 and not (own_model(plan.reference) or _unseen_model(plan.reference))
        else []
    )
    scorers = [(f"reward {choice.name or choice.label}", strategy) for choice, strategy in plan.rewards]
    roles += [name for name, strategy in scorers if _is_adapter(strategy)]
    roles += ["value"] if plan.value_on != "none" else []
    storage = f"{plan.config.model.dtype}, quantization {plan.config.quantization.label}"
    return (
        f"In memory once: {plan.config.model.path} ({storage}). {_listed(roles)} look{'s' if len(roles) == 1 else ''} through it, "
        "told apart by adapters and small heads, which are float32."
    )


def _separate_models(plan: Chosen) -> Iterator[str]:
    """Whole models beside the base, and the base twice while it is prepared."""
    strategies = [("the reference", plan.reference)] if plan.config.ppo.kl.coef > 0 else []
    strategies += [(f"reward {choice.name or choice.label}", strategy) for choice, strategy in plan.rewards]
    strategies += [(f"judge {name}", strategy) for name, (_, strategy) in plan.judges.items()]
    models = [f"{name} ({path})" for name, strategy in strategies if (path := own_model(strategy))]
    models += [
        f"{name} ({model}, its size isn't known here)"
        for name, strategy in strategies
        if (model := _unseen_model(strategy))
    ]
    if models:
        yield f"Beside it, whole models of their own: {'; '.join(models)}."
    else:
        yield "Nothing is held twice: no role has a model of its own."
    if plan.hooks.implements(plan.reference, "marl_prepare_base") and plan.config.model.dtype != "float32":
        yield "While it is loaded, the base is there twice for a moment: it is prepared in float32, then cast or quantized."


def _is_adapter(strategy: Strategy) -> bool:
    """Whether a strategy names an adapter on the base, here or on the hub."""
    return bool(adapter_options(strategy)) or (is_adapter_option(strategy) and not_here(strategy) is not None)


def _unseen_model(strategy: Strategy) -> str | None:
    """A whole model that a strategy names and that isn't on this machine."""
    option = not_here(strategy)
    return option[1] if option and not is_adapter_option(strategy) else None


def _reference(plan: Chosen) -> str:
    """Which weights the KL penalty pulls towards, and why these are right or not."""
    label = plan.config.reference.label
    if plan.config.ppo.kl.coef == 0:
        return "No reference applies: ppo.kl.coef is 0, so nothing pulls the policy back."
    problem = mismatch(plan)
    if problem:
        return f"The reference is {label}, which is not where the policy starts: {problem}."
    description = plan.hooks.describe(plan.reference, plan)
    if description is not None:
        return f"The reference is {label}: {description}. The pre-flight check measures how far the policy's start is from it."
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
            "The policy is a new adapter on just that, which starts as the identity, so step-0 KL is 0."
        )
    return (
        f"The reference is {label}: the policy is a new adapter, which starts as the base itself; if this reference is the bare "
        "base, step-0 KL is 0. The pre-flight check measures it."
    )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
