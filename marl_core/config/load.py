"""YAML file + environment + --set -> RunConfig. A config built in Python never comes through here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from marl_core.config.foreign_configs import refuse_foreign
from marl_core.config.overrides import Setting, apply_settings, settings_from_environment, settings_from_options
from marl_core.config.redact import redacted
from marl_core.config.run_config import RunConfig
from marl_core.config.validation_messages import problem_lines
from marl_core.config.yaml_text import MAX_BYTES, Document, dump_yaml, parse_document
from marl_core.errors import ConfigError, InvalidConfig
from marl_core.registry.catalog import Catalog
from marl_core.registry.problems import told


def load_config(
    path: str | Path,
    sets: Iterable[str] = (),
    catalog: Catalog | None = None,
    env: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Read a config: `defaults` < file < environment (`MARL__PPO__KL__COEF`) < `sets` (`ppo.kl.coef=0.1`).

    Strategies are looked up in `catalog` (default: what is installed) and their options checked. `env` defaults to the
    process's environment. Relative paths are left as written: they are relative to the current directory.
    Raises ConfigError with one line per problem, PluginError for a plugin that is named and broken.
    """
    settings = settings_from_environment(os.environ if env is None else env) + settings_from_options(sets)
    document = _read(Path(path))
    refuse_foreign(document.value, str(path))
    written = apply_settings(RunConfig, {**(defaults or {}), **document.value}, settings)
    return parse_config(written, str(path), catalog or Catalog.installed(), settings, document)


def parse_config(
    written: Mapping[str, Any],
    source: str,
    catalog: Catalog,
    settings: Iterable[Setting] = (),
    document: Document | None = None,
) -> RunConfig:
    """Validate a config given as plain dicts and lists; ConfigError naming `source`, with one line per problem.

    Each problem names its source: the setting, or the line of the `document` that `written` was read from.
    """
    try:
        return RunConfig.model_validate(written, context={"catalog": catalog})
    except ValidationError as error:
        lines = problem_lines(error, written, RunConfig, catalog)
        located = [_with_location(line, path, source, settings, document) for path, line in lines.items()]
        raise InvalidConfig(told(source, located, " in the config")) from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply; a config has a few levels.") from error


def dump_config(config: RunConfig) -> str:
    """The config as YAML, every default written out, secrets struck out.

    Loads back to an equal config if its strategies are named and it holds no secret. ConfigError when an option can't be written
    as YAML.
    """
    try:
        return dump_yaml(redacted(config.model_dump(mode="json", by_alias=True)))
    except PydanticSerializationError as error:
        raise ConfigError(
            f"this config can't be written as YAML: {error}. Use plain texts and numbers as options."
        ) from error


def _read(path: Path) -> Document:
    try:
        with path.expanduser().open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"{path}: can't read the config: {reason}. Give the path of a YAML file.") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(
            f"{path}: larger than {MAX_BYTES:,} bytes, so it isn't a config. Give the path of a YAML file."
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from error
    document = parse_document(text, str(path))
    if not isinstance(document.value, dict):
        kind = "empty" if document.value is None else f"a {type(document.value).__name__}"
        raise ConfigError(
            f"{path}: the config is {kind}; it must be a mapping with keys such as model, reference and reward."
        )
    return document


def _with_location(
    line: str, path: tuple[str | int, ...], source: str, settings: Iterable[Setting], document: Document | None
) -> str:
    parts = tuple(str(part) for part in path)
    setting_sources = [setting.source for setting in settings if parts[: len(setting.path)] == setting.path]
    if setting_sources:
        return f"{line} (given by {setting_sources[-1]})"
    line_path = path or line.removeprefix("config: ").partition(":")[0].split(
        "."
    )  # between sections: the one told first
    number = document.line(line_path) if document is not None else None
    return line if number is None else f"{source}:{number}: {line}"
