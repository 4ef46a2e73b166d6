"""Finding things in a config: the section at a path, the choices of strategies, and what short forms stand for."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_origin

from pydantic import BaseModel

from marl_core.config.choice import Choice, choice_at
from marl_core.registry.families import family_keys
from marl_core.registry.model_keys import KeyPath, field_named, models_in


def choices_in(config: BaseModel) -> Iterator[tuple[KeyPath, Choice]]:
    """Every choice of a strategy that the run has, with its path in the config, in the order of the families."""
    return ((path, choice) for path, choice in all_choices_in(config) if choice.is_used)


def written_choices_in(config: BaseModel) -> Iterator[tuple[KeyPath, Choice]]:
    """`choices_in`, and those that say something though the run doesn't use them: the kind of an adapter that isn't made."""
    return ((path, choice) for path, choice in all_choices_in(config) if choice.is_written)


def all_choices_in(config: BaseModel) -> Iterator[tuple[KeyPath, Choice]]:
    """Every place of a config where a strategy is chosen."""
    for _, key in family_keys():
        value: Any = config
        for part in key.path.split("."):
            value = getattr(value, part)
        path: KeyPath = tuple(key.path.split("."))
        if key.many == "one":
            yield path, value
        else:
            named = value.items() if key.many == "named" else enumerate(value)
            yield from (((*path, name), choice) for name, choice in named)


def with_long_choices(written: Any) -> Any:
    """A copy of a config of plain dicts and lists, in which a strategy named by one word is written as `{use: name}`."""
    config = copy.deepcopy(written)
    for family, key in family_keys():
        container: Any = config
        for part in key.section.split(".") if key.section else ():
            container = container.get(part) if isinstance(container, dict) else None
        if isinstance(container, dict) and key.name in container:
            container[key.name] = _long(container[key.name], choice_at(family, key), key.many == "named")
    return config


def _long(value: Any, choice: type[Choice], named: bool) -> Any:
    if isinstance(value, list):
        return [choice.long_form(entry) for entry in value]
    if named and isinstance(value, Mapping):
        return {name: choice.long_form(entry) for name, entry in value.items()}
    return choice.long_form(value)


def long_form(root: type[BaseModel], path: Sequence[str], value: Any, child: str) -> Any:
    """The section or list that the short `value` at `path` in a `root` stands for, so that its key `child` can be set.

    None when there is none. A single entry where a list is allowed becomes a list of one when `child` is an index.
    """
    model = root
    container_type: Any = None
    for part in path:
        if container_type is not None:  # this part is the index or the name of an entry
            container_type = None
            continue
        field = field_named(model, part)
        section = next(models_in(field.annotation), None) if field else None
        if field is None or section is None:
            return None
        model, origin = section, get_origin(field.annotation)
        container_type = origin if origin in (list, dict) else None
    if container_type is list and child.isdecimal():
        return [value]
    if container_type is dict:
        return None
    mapping = model.long_form(value) if hasattr(model, "long_form") else value
    return mapping if isinstance(mapping, dict) else None
