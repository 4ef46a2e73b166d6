"""Configs as commented YAML text: one line a section, a sentence of explanation above it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from marl_core import ConfigError

MODELINE = "# yaml-language-server: $schema=marl.schema.json"


def render(config: Mapping[str, Any], about: Mapping[str, str], head: Iterable[str] = ()) -> str:
    """The config's sections in their order, each with its comment; `head` are comment lines at the top."""
    lines = [f"# {line}".rstrip() for line in head]
    for name, section in config.items():
        lines += ["", *(f"# {line}" for line in about.get(name, "").splitlines()), _dump(name, section)]
    return "\n".join(lines).lstrip("\n") + "\n"


def _dump(name: str, section: Any) -> str:
    flow = None if isinstance(section, Mapping | list) else False
    text = yaml.safe_dump({name: section}, sort_keys=False, allow_unicode=True, width=120, default_flow_style=flow)
    return str(text).rstrip().replace("{'on': ", "{on: ")  # a key, not a truth value: marl reads YAML so


def write(text: str, file: Path | None, force: bool = False) -> bool:
    """Write into a new file; without one, say that it has to be printed. ConfigError when the file is there already."""
    if file is None:
        return False
    if file.exists() and not force:
        raise ConfigError(f"{file}: there is such a file already. Give another name, or --force to overwrite it.")
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: can't be written: {error.strerror or error}. Give another name.") from error
    return True
