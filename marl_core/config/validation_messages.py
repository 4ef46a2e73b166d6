"""The problems of a config, or of a section of it, as a person reads them: with near matches of sections, keys and strategies' options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from marl_core.config.choice import Choice
from marl_core.config.foreign_names import ours
from marl_core.errors import MarlError
from marl_core.registry import problems
from marl_core.registry.catalog import Catalog, installed_once
from marl_core.registry.model_keys import KeyPath, keys_of, models_in


def problem_lines(
    error: ValidationError,
    config: Mapping[str, Any],
    root: type[BaseModel],
    catalog: Catalog | None = None,
    prefix: KeyPath = (),
) -> dict[KeyPath, str]:
    """Each problem's path in `config`, which was to be a `root`, and its line. `prefix` is the path of the part that was validated."""
    return problems.problem_lines(
        error,
        config,
        lambda path: _suggestion(path, config, root, catalog),
        prefix,
        lambda path: _required(path, config, root, catalog),
    )


def _suggestion(path: KeyPath, config: Mapping[str, Any], root: type[BaseModel], catalog: Catalog | None) -> str:
    key, model = str(path[-1]), _model_at(path[:-1], config, root)[0]
    nested: list[str] = []
    keys = _keys_at(path[:-1], config, root, catalog)
    if model is not None and _is_section(model):
        known = ours(key, (*_place_of(root), *path[:-1]))
        if known is not None and (
            "." in known or known in keys
        ):  # the kind of adapter that is asked for may not have it
            return f"Did you mean {known!r}?"
        nested = [f"{name}.{inner}" for name, keys in _sections(model).items() for inner in keys]
    of_a_strategy = model is not None and issubclass(model, Choice)  # what it lacks may be another strategy's option
    sections = [] if of_a_strategy else [name for name, keys in _sections(root).items() if key in keys]
    return problems.suggestion(key, keys, sections, nested)


def _place_of(root: type[BaseModel]) -> KeyPath:
    """Where a section stands in a config, of a section that is told by itself (`PPOSection(...)`)."""
    place: str = getattr(root, "place", None) or ""
    return tuple(place.split(".")) if place else ()


def _required(path: KeyPath, config: Mapping[str, Any], root: type[BaseModel], catalog: Catalog | None) -> str:
    """How to give an option to a strategy that was named by one word, which is how people meet options first."""
    key, (model, value) = str(path[-1]), _model_at(path[:-1], config, root)
    if model is None or not issubclass(model, Choice) or not isinstance(value, str):
        return ""
    described = _option_fields(model, value, catalog).get(key)
    example = re.search(r"\be\.g\. (.+?)\.?$", (described.description or "") if described else "")
    return f"Write {{use: {value}, {key}: {example.group(1) if example else '...'}}}."


def _keys_at(path: KeyPath, config: Mapping[str, Any], root: type[BaseModel], catalog: Catalog | None) -> list[str]:
    """The keys that are allowed at `path`, a strategy's options included."""
    model, value = _model_at(path, config, root)
    if model is None:
        return []
    return _keys(model, value, catalog)


def _keys(model: type[BaseModel], value: Any, catalog: Catalog | None) -> list[str]:
    """A section's keys, and of a choice the options of the strategy that it names."""
    if not issubclass(model, Choice):
        return keys_of(model)
    return [key for key in keys_of(model) if key != "options"] + list(_option_fields(model, value, catalog))


def _is_section(model: type[BaseModel]) -> bool:
    """Whether it is a section, which may be a choice as well. By duck: config/section.py stands above this file."""
    return not issubclass(model, Choice) or hasattr(model, "place")


def _model_at(path: KeyPath, config: Mapping[str, Any], root: type[BaseModel]) -> tuple[type[BaseModel] | None, Any]:
    """The section or choice at `path`, None where there is none, and what was written there."""
    model: type[BaseModel] | None = root
    value: Any = config
    for part in path:
        if isinstance(part, str) and model is not None and part in model.model_fields:
            model = next(models_in(model.model_fields[part].annotation), None)
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(part, int):
            value = value[part] if isinstance(value, list | tuple) else value  # a single entry stands for a list of one
        else:
            value = None
    return model, value


def _option_fields(model: type[Choice], value: Any, catalog: Catalog | None) -> Mapping[str, FieldInfo]:
    name = value.get("use", model.default_use) if isinstance(value, Mapping) else value
    if not isinstance(name, str):
        return {}
    try:
        return (catalog or installed_once()).load(model.family, name).strategy_class.model_fields
    except MarlError:
        return {}


def _sections(root: type[BaseModel]) -> dict[str, list[str]]:
    """Every section's keys, nested ones by dotted name."""
    sections: dict[str, list[str]] = {}
    queue: list[tuple[str, type[BaseModel]]] = [("", root)]
    while queue:
        prefix, model = queue.pop(0)
        for name, field in model.model_fields.items():
            for inner in models_in(field.annotation):
                if _is_section(inner):
                    sections[f"{prefix}{name}"] = _keys(inner, {}, None)
                    queue.append((f"{prefix}{name}.", inner))
    return sections
