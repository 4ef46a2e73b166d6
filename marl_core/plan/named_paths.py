"""What a strategy's options name on this machine: adapters, and models of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator

from marl_core.artifacts.adapter_files import CONFIG_FILE
from marl_core.artifacts.hub import adapter_folder, is_repo_name
from marl_core.artifacts.model_files import read_model
from marl_core.errors import DataError
from marl_core.registry.strategy import Strategy

LOCATION_OPTIONS = ("revision", "subfolder")
"""Options that say where inside another option's repository or folder; no paths of their own."""


def path_options(strategy: Strategy) -> Iterator[tuple[str, str]]:
    """The strategy's options that may be paths."""
    for name in type(strategy).model_fields:
        if name in LOCATION_OPTIONS:
            continue
        value = getattr(strategy, name)
        if isinstance(value, str | os.PathLike):
            yield name, os.path.expanduser(os.fspath(value))


def revision_and_subfolder(strategy: Strategy) -> tuple[str | None, str | None]:
    """Its revision and its subfolder, where it has such options."""
    revision, subfolder = (getattr(strategy, name, None) for name in LOCATION_OPTIONS)
    return revision if isinstance(revision, str) else None, subfolder if isinstance(subfolder, str) else None


def adapter_options(strategy: Strategy) -> list[tuple[str, str]]:
    """Those options that name an adapter on this machine, with its folder: of a hub name the snapshot in the cache."""
    folders = [(name, adapter_folder(path, *revision_and_subfolder(strategy))) for name, path in path_options(strategy)]
    return [(name, folder) for name, folder in folders if folder and os.path.isfile(os.path.join(folder, CONFIG_FILE))]


def hub_option(strategy: Strategy) -> tuple[str, str] | None:
    """The option that names a repository, with its value: the required text of a strategy that has a `revision`. None for others."""
    fields = type(strategy).model_fields
    if LOCATION_OPTIONS[0] not in fields:
        return None
    required = [name for name, info in fields.items() if info.is_required() and info.annotation is str]
    return (required[0], str(getattr(strategy, required[0]))) if len(required) == 1 else None


def is_adapter_option(strategy: Strategy) -> bool:
    """Whether what `hub_option` names is an adapter: only those are looked for in a `subfolder`."""
    return LOCATION_OPTIONS[1] in type(strategy).model_fields


def not_here(strategy: Strategy) -> tuple[str, str] | None:
    """The option that names an adapter or a model on the hub, with its value, where this machine has no weights of that name."""
    option = hub_option(strategy)
    if option is None or os.path.exists(os.path.expanduser(option[1])) or not is_repo_name(option[1], owner=False):
        return None
    return None if adapter_options(strategy) or own_model(strategy) else option


def own_model(strategy: Strategy) -> str | None:
    """The option of a strategy that names a whole model on this machine, with weights; None when none does."""
    if adapter_options(strategy):
        return None
    for _, path in path_options(strategy):
        try:
            model = read_model(path, revision_and_subfolder(strategy)[0])
            if model is not None and model.shapes():
                return path
        except DataError:
            continue
    return None
