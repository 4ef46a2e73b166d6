"""A pydantic ValidationError as a person reads it: a line per problem with path, value, what is allowed, near match."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from marl_core.config.choice import Choice
from marl_core.config.fields import Place, dotted, models_in
from marl_core.config.run_config import RunConfig
from marl_core.errors import MarlError, near_match
from marl_core.registry.catalog import Catalog


def problem_lines(
    error: ValidationError, config: Mapping[str, Any], catalog: Catalog | None = None, prefix: Place = ()
) -> dict[Place, str]:
    """Each problem's place in `config` and its line. `prefix` is the place of the part that was validated."""
    found: dict[Place, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        found.setdefault(_place((*prefix, *details["loc"]), details["type"], config), []).append(details)
    return {place: _line(place, details, config, catalog) for place, details in found.items()}


def _place(location: Place, kind: str, config: Mapping[str, Any]) -> Place:
    """`location` without pydantic's tags for members of a union, which stand in no file."""
    place: list[str | int] = []
    here: Any = config
    for index, part in enumerate(location):
        is_missing = kind == "missing" and index == len(location) - 1
        if isinstance(here, Mapping) and isinstance(part, str):
            if part in here:
                here = here[part]
            elif index and not is_missing:
                continue
            else:
                here = None
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        elif not is_missing:
            continue
        place.append(part)
    return tuple(place)


def _line(place: Place, found: list[ErrorDetails], config: Mapping[str, Any], catalog: Catalog | None) -> str:
    first = found[0]
    path = dotted(place) or "config"
    if first["type"] == "extra_forbidden":
        return f"{path}: unknown key. {_near(place, config, catalog)}"
    if first["type"] == "missing":
        return f"{path}: is required and wasn't given."
    if first["type"] == "value_error":
        return f"{path}: {first['msg'].removeprefix('Value error, ').rstrip('.')}."
    wanted = _wanted(" or ".join(dict.fromkeys(details["msg"] for details in found)))
    return f"{path}: {wanted}, but {_shown(first['input'])} was given."


def _wanted(message: str) -> str:
    text = message.replace("Input should", "should")
    text = re.sub(r"a valid dictionary or instance of \w+", "a section (a mapping with keys)", text)
    text = re.sub(r" or should be an instance of Strategy", "", text)
    return text[:1].lower() + text[1:]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _near(place: Place, config: Mapping[str, Any], catalog: Catalog | None) -> str:
    known = _keys_at(place[:-1], config, catalog)
    key = str(place[-1])
    near = near_match(key, known)
    if near is not None:
        return f"Did you mean {near!r}?"
    homes = [name for name, fields in _sections().items() if key in fields]
    if homes:
        return f"It belongs in {' or '.join(homes)}."
    return f"Known here: {', '.join(sorted(known))}." if known else "Remove it."


def _keys_at(path: Place, config: Mapping[str, Any], catalog: Catalog | None) -> list[str]:
    """The keys that are allowed at `path`, a strategy's options included."""
    model: type[BaseModel] | None = RunConfig
    here: Any = config
    for part in path:
        if isinstance(part, str) and model is not None and part in model.model_fields:
            model = next(models_in(model.model_fields[part].annotation), None)
        here = here.get(part) if isinstance(here, Mapping) else here[int(part)]
    if model is None:
        return []
    keys = [field.alias or name for name, field in model.model_fields.items()]
    if issubclass(model, Choice):
        keys = [key for key in keys if key != "options"] + _options(model, here, catalog)
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
    todo: list[tuple[str, type[BaseModel]]] = [("", RunConfig)]
    while todo:
        prefix, model = todo.pop(0)
        for name, field in model.model_fields.items():
            for inner in models_in(field.annotation):
                if not issubclass(inner, Choice):
                    sections[f"{prefix}{name}"] = [part.alias or key for key, part in inner.model_fields.items()]
                    todo.append((f"{prefix}{name}.", inner))
    return sections
