"""The problems of a config, or of a section of it, as a person reads them: with near matches of sections, keys and strategies' options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from marl_core.config.choice import Choice
from marl_core.errors import MarlError
from marl_core.registry import problems
from marl_core.registry.catalog import Catalog
from marl_core.registry.model_keys import KeyPath, keys_of, models_in


def problem_lines(
    error: ValidationError,
    config: Mapping[str, Any],
    root: type[BaseModel],
    catalog: Catalog | None = None,
    prefix: KeyPath = (),
) -> dict[KeyPath, str]:
    """Each problem's path in `config`, which was to be a `root`, and its line. `prefix` is the path of the part that was validated."""
    return problems.problem_lines(error, config, lambda path: _suggestion(path, config, root, catalog), prefix)


def _suggestion(path: KeyPath, config: Mapping[str, Any], root: type[BaseModel], catalog: Catalog | None) -> str:
    key = str(path[-1])
    sections = (name for name, keys in _sections(root).items() if key in keys)
    return problems.suggestion(key, _keys_at(path[:-1], config, root, catalog), sections)


def _keys_at(path: KeyPath, config: Mapping[str, Any], root: type[BaseModel], catalog: Catalog | None) -> list[str]:
    """The keys that are allowed at `path`, a strategy's options included."""
    model: type[BaseModel] | None = root
    value: Any = config
    for part in path:
        if isinstance(part, str) and model is not None and part in model.model_fields:
            model = next(models_in(model.model_fields[part].annotation), None)
        value = value.get(part) if isinstance(value, Mapping) else value[int(part)]
    if model is None:
        return []
    if issubclass(model, Choice):
        return [key for key in keys_of(model) if key != "options"] + _options(model, value, catalog)
    return keys_of(model)


def _options(model: type[Choice], value: Any, catalog: Catalog | None) -> list[str]:
    name = value.get("use") if isinstance(value, Mapping) else value
    if catalog is None or not isinstance(name, str):
        return []
    try:
        return list(catalog.load(model.family, name).strategy_class.model_fields)
    except MarlError:
        return []


def _sections(root: type[BaseModel]) -> dict[str, list[str]]:
    """Every section's keys, nested ones by dotted name."""
    sections: dict[str, list[str]] = {}
    queue: list[tuple[str, type[BaseModel]]] = [("", root)]
    while queue:
        prefix, model = queue.pop(0)
        for name, field in model.model_fields.items():
            for inner in models_in(field.annotation):
                if not issubclass(inner, Choice):
                    sections[f"{prefix}{name}"] = keys_of(inner)
                    queue.append((f"{prefix}{name}.", inner))
    return sections
