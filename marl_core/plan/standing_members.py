"""Strategies that a run has whether its config names them or not, as the records of the families say: observers of every run."""

from __future__ import annotations

from collections.abc import Iterator

from marl_core.config.choice import Choice, choice_of
from marl_core.config.run_config import RunConfig
from marl_core.errors import MarlError
from marl_core.registry.catalog import Catalog
from marl_core.registry.families import Family, Key, family_keys

OWN_PACKAGE = "marl-core"


def with_standing_members(config: RunConfig, catalog: Catalog, *, command_line: bool = False) -> RunConfig:
    """The config with its standing members at the end of their lists. One that is named stays as it is named.

    `command_line`: whether the run was started there. A member that isn't installed is left out.
    """
    added: dict[str, list[Choice]] = {}
    for family, key in family_keys():
        named: list[Choice] = getattr(config, key.name) if key.many == "list" and not key.section else []
        missing = [name for name in _standing(key, config, command_line) if not _is_named(name, named, family, catalog)]
        new = [choice_of(family)(use=use) for name in missing if (use := _installed(name, family, catalog)) is not None]
        if new:
            added[key.name] = [*named, *new]
    return config.model_copy(update=added) if added else config


def _standing(key: Key, config: RunConfig, command_line: bool) -> Iterator[str]:
    if key.on_command_line is not None and command_line:
        yield key.on_command_line
    if key.with_folder is not None and config.run.folder is not None:
        yield key.with_folder


def _is_named(name: str, choices: list[Choice], family: Family, catalog: Catalog) -> bool:
    """Whether one of the choices is this strategy: by its name, as an object, or as something derived from it."""
    if any(isinstance(choice.use, str) and choice.use.rpartition("/")[2] == name for choice in choices):
        return True
    installed = _installed(name, family, catalog)
    if installed is None or not choices:
        return False
    standing = catalog.load(family.name, installed).strategy_class
    return any(isinstance(_strategy(choice, catalog), standing) for choice in choices)


def _strategy(choice: Choice, catalog: Catalog) -> object:
    try:
        return choice.resolve(catalog)
    except (MarlError, ValueError):  # the plan says what is wrong with it, and where it stands
        return None


def _installed(name: str, family: Family, catalog: Catalog) -> str | None:
    """The name to use: of several packages that offer it, marl's own is meant."""
    offers = [listing for listing in catalog.listings(family.name) if listing.name == name]
    if not offers:
        return None
    return name if len(offers) == 1 else f"{OWN_PACKAGE}/{name}"
