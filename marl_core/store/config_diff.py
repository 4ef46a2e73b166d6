"""What changed in the config between a run's start and its resume, and whether it matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from marl_core.config.fields import with_long_choices
from marl_core.config.load import dump_config
from marl_core.config.run_config import RunConfig
from marl_core.errors import ConfigError, DataError

HARMLESS = (
    "observers",
    "run.checkpoint_every",
    "run.keep",
    "run.threads",
    "run.timeout_seconds",
    "model.shard",
    "ppo.steps",
    "eval",
)
"""Keys that may change on resume without changing the mathematics of a step (ppo.steps: with a constant schedule)."""


def changed_keys(file: Path, config: RunConfig, *, override: bool = False) -> list[str]:
    """A sentence on each change since `file` was written. ConfigError when one changes the mathematics, unless overridden."""
    try:
        was = flat(with_long_choices(yaml.safe_load(file.read_text(encoding="utf-8"))))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"resume: {file} can't be read ({error}).") from error
    now = flat(yaml.safe_load(dump_config(config)))
    lines = {
        key: f"{key}: {was.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and key != "run.folder"  # a run may be moved
    }
    harmless = [name for name in HARMLESS if name != "ppo.steps" or config.ppo.schedule == "constant"]
    serious = [key for key in lines if not any(key == name or key.startswith(name + ".") for name in harmless)]
    if serious and not override:
        listed = "\n".join(f"  {lines[key]}" for key in serious)
        raise ConfigError(
            f"resume: the config changed the run's mathematics since it was started:\n{listed}\nRestore it, or resume with --override."
        )
    return [f"config changed{' (--override)' if key in serious else ''}: {line}" for key, line in lines.items()]


def flat(value: Any, place: str = "") -> dict[str, Any]:
    """Nested tables as one, the keys joined by dots."""
    if isinstance(value, dict):
        return {
            key: leaf
            for name, inner in value.items()
            for key, leaf in flat(inner, f"{place}.{name}" if place else str(name)).items()
        }
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        return {key: leaf for i, inner in enumerate(value) for key, leaf in flat(inner, f"{place}.{i}").items()}
    return {place: value}
