"""A pydantic ValidationError as a person reads it: a line per problem with path, value, what is allowed, near match."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from marl_core.config.choice import Choice
from marl_core.config.fields import KeyPath, dotted, models_in
from marl_core.config.run_config import RunConfig
from marl_core.errors import MarlError, near_match
from marl_core.registry.catalog import Catalog


def problem_lines(
    error: ValidationError, config: Mapping[str, Any], catalog: Catalog | None = None, prefix: KeyPath = ()
) -> dict[KeyPath, str]:
    """Each problem's path in `config` and its line. `prefix` is the path of the part that was validated."""
    errors_by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        errors_by_path.setdefault(_config_path((*prefix, *details["loc"]), details["type"], config), []).append(details)
    return {path: _line(path, details, config, catalog) for path, details in errors_by_path.items()}


def _config_path(location: KeyPath, kind: str, config: Mapping[str, Any]) -> KeyPath:
    """pydantic's `location` without its tags for members of a union, which are no keys of the config."""
    path: list[str | int] = []
    value: Any = config
    for index, part in enumerate(location):
        is_missing = kind == "missing" and index == len(location) - 1
        if isinstance(value, Mapping) and isinstance(part, str):
            if part in value:
                value = value[part]
            elif index and not is_missing:
                continue
            else:
                value = None
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif not is_missing:
            continue
        path.append(part)
    return tuple(path)


def _line(path: KeyPath, errors: list[ErrorDetails], config: Mapping[str, Any], catalog: Catalog | None) -> str:
    first = errors[0]
    dotted_path = dotted(path) or "config"
    if first["type"] == "extra_forbidden":
        return f"{dotted_path}: unknown key. {_suggestion(path, config, catalog)}"
    if first["type"] == "missing":
        return f"{dotted_path}: is required and wasn't given."
    if first["type"] == "value_error":
        return f"{dotted_path}: {first['msg'].removeprefix('Value error, ').rstrip('.')}."
    expectation = _expectation(" or ".join(dict.fromkeys(details["msg"] for details in errors)))
    return f"{dotted_path}: {expectation}, but {_shortened(first['input'])} was given."


def _expectation(message: str) -> str:
    text = message.replace("Input should", "should")
    text = re.sub(r"a valid dictionary or instance of \w+", "a section (a mapping with keys)", text)
    text = re.sub(r" or should be an instance of Strategy", "", text)
    return text[:1].lower() + text[1:]


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _suggestion(path: KeyPath, config: Mapping[str, Any], catalog: Catalog | None) -> str:
    keys = _keys_at(path[:-1], config, catalog)
    key = str(path[-1])
    near = near_match(key, keys)
    if near is not None:
        return f"Did you mean {near!r}?"
    sections = [name for name, fields in _sections().items() if key in fields]
    if sections:
        return f"It belongs in {' or '.join(sections)}."
    return f"Known here: {', '.join(sorted(keys))}." if keys else "Remove it."


def _keys_at(path: KeyPath, config: Mapping[str, Any], catalog: Catalog | None) -> list[str]:
    """The keys that are allowed at `path`, a strategy's options included."""
    model: type[BaseModel] | None = RunConfig
    value: Any = config
    for part in path:
        if isinstance(part, str) and model is not None and part in model.model_fields:
            model = next(models_in(model.model_fields[part].annotation), None)
        value = value.get(part) if isinstance(value, Mapping) else value[int(part)]
    if model is None:
        return []
    keys = [field.alias or name for name, field in model.model_fields.items()]
    if issubclass(model, Choice):
        keys = [key for key in keys if key != "options"] + _options(model, value, catalog)
    return keys


def _options(model: type[Choice], value: Any, catalog: Catalog | None) -> list[str]:
    name = value.get("use") if isinstance(value, Mapping) else value
    if catalog is None or not isinstance(name, str):
        return []
    try:
        return list(catalog.load(model.family, name).strategy_class.model_fields)
    except MarlError:
        return []


def _sections() -> dict[str, list[str]]:
    """Every section's keys, nested ones by dotted name."""
    sections: dict[str, list[str]] = {}
    queue: list[tuple[str, type[BaseModel]]] = [("", RunConfig)]
    while queue:
        prefix, model = queue.pop(0)
        for name, field in model.model_fields.items():
            for inner in models_in(field.annotation):
                if not issubclass(inner, Choice):
                    sections[f"{prefix}{name}"] = [part.alias or key for key, part in inner.model_fields.items()]
                    queue.append((f"{prefix}{name}.", inner))
    return sections
