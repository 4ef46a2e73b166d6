"""Names in a config that are neither a folder here nor in this machine's cache: on the hub, or mistyped paths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from marl_core.artifacts.adapter_files import CONFIG_FILE as ADAPTER_CONFIG
from marl_core.artifacts.hub import cached_file, is_repo_name
from marl_core.artifacts.model_files import CONFIG_FILE
from marl_core.artifacts.near_folder import near_folder
from marl_core.plan.chosen import Chosen
from marl_core.plan.named_paths import revision_and_subfolder
from marl_core.registry.strategy import Strategy

HUB_OPTIONS = ("adapter", "path", "model")
"""Options that name an adapter or a model, of strategies that have a `revision` beside them: of others they may be anything."""


@dataclass(frozen=True, slots=True)
class HubName:
    """A name that the run will ask the hub for, and the config key that gives it."""

    key: str
    name: str
    revision: str | None = None


def hub_names(plan: Chosen) -> list[HubName]:
    """Adapters, tokenizers and models beside the base that the run has to fetch. Neither weights nor the hub are asked."""
    config = plan.config
    policy = config.policy
    named: list[tuple[HubName, str | None]] = (
        [(HubName("model.tokenizer", config.model.tokenizer), None)] if config.model.tokenizer else []
    )
    if policy.source:
        named.append((HubName("policy.from", policy.source, policy.revision), policy.subfolder))
    for strategy in plan.places:
        named += list(_of(plan, strategy))
    return [name for name, subfolder in named if _is_missing(name, subfolder)]


def not_here(plan: Chosen) -> list[str]:
    """For `marl check`: what was not looked at because it has to be fetched."""
    return [
        f"{name.key}: {name.name!r} is no folder here, so it is looked for on the hub, and isn't in this machine's cache: what it "
        "is, its labels or shapes, and its memory were not checked."
        for name in hub_names(plan)
        if near_folder(name.name) is None  # else a warning tells it
    ]


def near_folder_warnings(plan: Chosen) -> Iterator[str]:
    """Names that will be taken for the hub's while a folder of nearly that name is here."""
    model = plan.config.model
    names = [name for name in (HubName("model.path", model.path, model.revision),) if _is_missing(name, None)]
    for name in [*names, *hub_names(plan)]:
        near = near_folder(name.name)
        if near is not None:
            yield (
                f"{name.key}: {name.name!r} is no folder here, so it is looked for on the hub, and isn't in this machine's cache. Did you "
                f"mean {near!r}?"
            )


def _of(plan: Chosen, strategy: Strategy) -> Iterator[tuple[HubName, str | None]]:
    revision, subfolder = revision_and_subfolder(strategy)
    fields = type(strategy).model_fields
    for option in HUB_OPTIONS if "revision" in fields else ():
        value = getattr(strategy, option, None) if option in fields else None
        if isinstance(value, str):
            yield HubName(plan.hooks.key_of(strategy, option), value, revision), subfolder


def _is_missing(name: HubName, subfolder: str | None) -> bool:
    """Whether it can only be had from the hub."""
    if os.path.exists(os.path.expanduser(name.name)) or not is_repo_name(name.name, owner=False):
        return False
    files = (CONFIG_FILE, ADAPTER_CONFIG, "tokenizer_config.json", "tokenizer.json")
    prefix = f"{subfolder}/" if subfolder else ""
    return all(cached_file(name.name, prefix + file, name.revision) is None for file in files)
