"""Layers over the config file: `MARL__PPO__KL__COEF=0.1` in the environment, then `--set ppo.kl.coef=0.1`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from marl_core.config.fields import long_form
from marl_core.config.yaml_text import parse_yaml
from marl_core.errors import ConfigError, in_words

ENVIRONMENT_PREFIX = "MARL__"
Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """One value for one config key, and where it was given (for messages)."""

    path: Path
    value: Any
    source: str


def settings_from_environment(env: Mapping[str, str]) -> list[Setting]:
    """Variables called MARL__SECTION__KEY, in order of name; values are YAML. ConfigError for what isn't."""
    names = sorted(name for name in env if name.upper().startswith(ENVIRONMENT_PREFIX))
    return [
        _setting(name[len(ENVIRONMENT_PREFIX) :].lower().split("__"), env[name], f"environment variable {name}")
        for name in names
    ]


def settings_from_options(sets: Iterable[str]) -> list[Setting]:
    """`a.b=c` as given to --set, in order; values are YAML. ConfigError for what isn't of this form."""
    settings = []
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{_told(text)}: needs the form section.key=value, e.g. {_told('ppo.kl.coef=0.1')}.")
        settings.append(_setting(key.strip().split("."), value, _told(text)))
    return settings


def _told(text: str) -> str:
    """How messages call a setting: the option, or in Python the entry of `load_config(..., sets=[...])`."""
    return in_words(f"--set {text}", f"sets[{text!r}]")


def apply_settings(root: type[BaseModel], config: Mapping[str, Any], settings: Iterable[Setting]) -> dict[str, Any]:
    """A copy of `config`, a `root` as plain dicts and lists, with the settings written into it, the later over the earlier.

    Strategies in it stay the same objects. ConfigError for a path through a plain value.
    """
    result: dict[str, Any] = _copied(config)
    for setting in settings:
        _write(root, result, setting)
    return result


def _copied(value: Any) -> Any:
    """Dicts and lists anew, what they hold as it is."""
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _setting(parts: list[str], value: str, source: str) -> Setting:
    if not all(parts):
        raise ConfigError(f"{source}: an empty key. Write section.key, or MARL__SECTION__KEY in the environment.")
    return Setting(tuple(parts), parse_yaml(value, source), source)


def _write(root: type[BaseModel], config: dict[str, Any], setting: Setting) -> None:
    """Write the setting's value at its path, turning short forms on the way into sections."""
    container: Any = config
    for depth, part in enumerate(setting.path):
        key = _key(container, part, setting)
        if depth == len(setting.path) - 1:
            if isinstance(container, list) and key == len(container):
                container.append(setting.value)
            else:
                container[key] = setting.value
            return
        child = container[key] if isinstance(container, list) else container.get(key)
        container[key] = _section(root, setting.path[: depth + 1], child, setting.path[depth + 1], setting)
        container = container[key]


def _key(container: Any, part: str, setting: Setting) -> Any:
    if isinstance(container, dict):
        return part
    is_last = part == setting.path[-1]
    if part.isdecimal() and int(part) < len(container) + is_last:
        return int(part)
    raise ConfigError(
        f"{setting.source}: the list has {len(container)} entries, so {part!r} names none of them; count from 0."
    )


def _section(root: type[BaseModel], path: Path, value: Any, next_part: str, setting: Setting) -> Any:
    """What stands at `path`, in the long form that can be descended into."""
    if isinstance(value, list) or (isinstance(value, dict) and not next_part.isdecimal()):
        return value
    if value is None:
        return {}
    section = long_form(root, path, value, next_part)
    if section is None and not isinstance(value, dict):
        raise ConfigError(
            f"{setting.source}: {'.'.join(path)} is the value {value!r}, not a section; it has no {next_part!r}."
        )
    return value if section is None else section
