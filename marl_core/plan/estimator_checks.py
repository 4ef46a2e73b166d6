"""What the advantage estimator needs, compared with the rest of the config: values, and responses to compare."""

from __future__ import annotations

from collections.abc import Iterator

from marl_core.config.adapter_config import AdapterSection, ValueSection
from marl_core.config.choice import default_options
from marl_core.plan.chosen import Chosen
from marl_core.registry.strategy import Estimator

OWN_ADAPTER_HINT = "write value: {on: own, ...}, or take them out"


def estimator_findings(plan: Chosen) -> Iterator[str]:
    """A sentence for each key of `value` and `ppo` that doesn't go with the estimator."""
    on, label = plan.config.value.on, plan.config.ppo.advantage.label
    if on == "none" and plan.estimator.needs_values:
        yield f"value: none doesn't go with ppo.advantage: {label}, which needs a value function; write value: policy"
    elif on in ("policy", "own") and not plan.estimator.needs_values:
        yield f"value: {on} is never used with ppo.advantage {label}; write value: none"
    unused_keys = _adapter_keys(plan) if plan.value_on != "own" else []
    if unused_keys:
        location = f"{plan.value_on!r}{'' if on else ' where value.on is not given'}"
        yield f"value: only an adapter of its own has {', '.join(unused_keys)}, and the value function is on {location}; {OWN_ADAPTER_HINT}"
    problem = nothing_to_compare(plan.estimator, label, plan.config.ppo.samples_per_prompt)
    if problem is not None:
        yield f"ppo: {problem}"


def nothing_to_compare(estimator: Estimator, label: str, samples_per_prompt: int) -> str | None:
    """Why an estimator that compares responses to one prompt has none to compare; None when it has, or doesn't."""
    if not estimator.needs_groups or samples_per_prompt >= 2:
        return None
    return f"advantage {label} compares responses to one prompt: samples_per_prompt must be 2 or more"


def _adapter_keys(plan: Chosen) -> list[str]:
    """Keys of the value's adapter with other values than the defaults: a config that was written out names them all."""
    defaults, value = ValueSection(), plan.config.value
    keys = [name for name in AdapterSection.model_fields if name != "options"]
    usual = default_options(type(value.resolve())) if value.options else {}
    return [
        *(name for name in keys if getattr(value, name) != getattr(defaults, name)),
        *(name for name, option in value.options.items() if name not in usual or option != usual[name]),
    ]
