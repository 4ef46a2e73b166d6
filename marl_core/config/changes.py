"""A config with other values at some keys, for Python: strategies that were given as objects stay these objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from marl_core.config.choice import Choice
from marl_core.config.fields import choices_in
from marl_core.config.overrides import Path, Setting, apply_settings
from marl_core.config.section import Section
from marl_core.config.validation_messages import problem_lines
from marl_core.errors import ConfigError, InvalidConfig, MarlDeprecationWarning, warn
from marl_core.registry.deprecation import deprecation
from marl_core.registry.model_keys import dotted, field_named, models_in
from marl_core.registry.problems import told
from marl_core.registry.strategy import Strategy

Config = TypeVar("Config", bound=BaseModel)
HOW_TO_WRITE = (
    'Write with_changes("ppo.kl.coef", 0.1, "ppo.steps", 20), or with_changes({"ppo.kl.coef": 0.1, "ppo.steps": 20}).'
)


def changed(config: Config, changes: Sequence[Any]) -> Config:
    """`config` with `changes`: keys and values in turn, or one mapping. ConfigError with a line for each problem."""
    root = type(config)
    settings = [
        setting
        for key, value in _pairs(changes)
        for setting in _settings(root, tuple(key.split(".")), value, f"with_changes({key!r}, ...)")
    ]
    written = apply_settings(root, as_written(config), settings)
    try:
        result = root.model_validate(written)
    except ValidationError as error:
        raise InvalidConfig(
            told("with_changes", problem_lines(error, written, root).values(), " in the config")
        ) from error
    for path, choice in choices_in(result):
        if isinstance(choice.use, Strategy) and choice.options:
            name = type(choice.use).__name__
            raise InvalidConfig(
                f"with_changes: {dotted(path)} is a {name} object, which holds its own options; {', '.join(choice.options)} can't be set "
                f'beside it. Give a new object: with_changes("{dotted(path)}", {name}(...)).'
            )
    return result


def as_written(value: Any) -> Any:
    """A config or a part of it as dicts and lists, with every default; what else it holds, strategies above all, as it is."""
    if isinstance(value, Choice):
        fields = {name: field for name, field in type(value).model_fields.items() if name != "options"}
        own = {field.alias or name: getattr(value, name) for name, field in fields.items() if _is_said(value, name)}
        return {**own, **as_written(value.options)}
    if isinstance(value, Section):
        fields = {name: field for name, field in type(value).model_fields.items() if not _is_unused(value, name)}
        return {field.alias or name: as_written(getattr(value, name)) for name, field in fields.items()}
    if isinstance(value, Mapping):
        return {key: as_written(inner) for key, inner in value.items()}
    return [as_written(inner) for inner in value] if isinstance(value, list) else value


def _is_said(choice: Choice, name: str) -> bool:
    """Whether a choice's key is to be written: the strategy that is meant where none is named needn't be."""
    return name != "use" or choice.use != choice.default_use or name in choice.model_fields_set


def _is_unused(section: Section, name: str) -> bool:
    """Whether a key is deprecated and nobody gave it: written out it would be warned of."""
    return bool(type(section).model_fields[name].deprecated) and name not in section.model_fields_set


def _pairs(changes: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    if len(changes) == 1 and isinstance(changes[0], Mapping):
        pairs = list(changes[0].items())
    elif len(changes) % 2:
        raise ConfigError(
            f"with_changes: an odd number of arguments ({len(changes)}) are no pairs of a key and its value. {HOW_TO_WRITE}"
        )
    else:
        pairs = list(zip(changes[::2], changes[1::2], strict=True))
    for key, value in pairs:
        if not isinstance(key, str) or not all(key.split(".")):
            raise ConfigError(f"with_changes: {key!r:.60} is no key of a config. {HOW_TO_WRITE}")
        yield key, value


def _settings(root: type[BaseModel], path: Path, value: Any, source: str) -> Iterator[Setting]:
    """One setting for each value; a mapping for a section has one for each of its keys."""
    path, section = _as_configs_write(root, path)
    if isinstance(value, Mapping) and section is not None:
        for key, inner in value.items():
            yield from _settings(root, (*path, str(key)), inner, source)
    else:
        yield Setting(path, as_written(value), source)


def _as_configs_write(root: type[BaseModel], path: Path) -> tuple[Path, type[Section] | None]:
    """A path in the words of a config file (`policy.from`, no old names), and the section that it names; None where it names none."""
    model: type[BaseModel] | None = root
    words: list[str] = []
    for part in path:
        field = None
        if model is not None and issubclass(model, Section):
            if part in model.renamed:
                new, since = model.renamed[part]
                warn(deprecation(".".join([*words, part]), ".".join([*words, new]), since), MarlDeprecationWarning)
                part = new
            field = field_named(model, part)
        words.append(field.alias or part if field else part)
        model = next(models_in(field.annotation), None) if field else None
    return tuple(words), model if model is not None and issubclass(model, Section) else None
