"""Files that a config of another trainer names, or is: keys with values, and rows of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from marl_core import ConfigError, MarlError, read_rows


def read_mapping(file: Path) -> dict[str, Any]:
    """A YAML or JSON file that holds keys; ConfigError when it doesn't."""
    try:
        mapping = yaml.safe_load(file.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file}: can't be read: {error}. Give a YAML file of keys.") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"{file}: holds a {type(mapping).__name__}, not keys with values.")
    for key in mapping:
        if not isinstance(key, str):
            raise ConfigError(
                f"{file}: its key {key!r} is read as a {type(key).__name__} and not as a name. Keys are names such as "
                "learning_rate; take this one out, or put it into quotes."
            )
    return mapping


def local_rows(file: str) -> list[Mapping[str, Any]] | None:
    """Rows of a prompts file on this machine; None when it isn't here or can't be read."""
    if not Path(file).expanduser().is_file():
        return None
    try:
        return read_rows(file)
    except MarlError:
        return None


def rows_of(file: str) -> int | None:
    """How many rows a prompts file has; None when that can't be told here."""
    rows = local_rows(file)
    return None if rows is None else len(rows)
