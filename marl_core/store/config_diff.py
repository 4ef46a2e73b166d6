"""What changed in the config between a run's start and its resume, and whether it matters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from marl_core.config.choice import default_options
from marl_core.config.fields import all_choices_in, with_long_choices
from marl_core.config.flatten import flatten
from marl_core.config.load import dump_config
from marl_core.config.run_config import RunConfig
from marl_core.config.yaml_text import parse_yaml
from marl_core.errors import OVERRIDE, ConfigError, DataError, in_words
from marl_core.registry.model_keys import dotted

CHANGEABLE_KEYS = (
    "observers",
    "run.checkpoint_every",
    "run.keep",
    "run.threads",
    "run.timeout_seconds",
    "speed.trim_memory",
    "model.shard",
    "ppo.steps",
    "eval",
)
"""Keys that may change on resume without changing the mathematics of a step (ppo.steps: with a constant schedule)."""


OPEN_NOW = {"speed.merge_for_sampling": False}
"""Keys that are left open by default since, with the default that older versions wrote out: of a LoRA, which all of them trained, both
mean the same."""
_NONE = object()


def changed_keys(file: Path, config: RunConfig, *, override: bool = False) -> list[str]:
    """A sentence on each change since `file` was written.

    ConfigError when one changes the mathematics, unless overridden; DataError when the file can't be read.
    """
    try:
        was = _flat(file.read_text(encoding="utf-8"), file.name)
    except (OSError, ConfigError, UnicodeDecodeError) as error:
        raise DataError(f"resume: {file} can't be read ({str(error).rstrip('.')}).") from error
    names = config.old_keys()
    was = {names.get(key, key): value for key, value in was.items()}
    now = _flat(dump_config(config), "config")
    for defaults in _defaults(config, was):
        was, now = (
            {key: value for key, value in flat.items() if defaults.get(key, _NONE) != value} for flat in (was, now)
        )
    lines = {
        key: f"{key}: {was.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and key != "run.folder"  # a run may be moved
        if not (now.get(key) is None and key in OPEN_NOW and was.get(key) == OPEN_NOW[key])
    }
    changeable = [name for name in CHANGEABLE_KEYS if name != "ppo.steps" or config.ppo.schedule == "constant"]
    serious = [key for key in lines if not any(key == name or key.startswith(name + ".") for name in changeable)]
    if serious and not override:
        changes = "\n".join(f"  {lines[key]}" for key in serious)
        raise ConfigError(
            f"resume: the config changed the run's mathematics since it was started:\n{changes}\n"
            f"Restore it, or resume with {in_words(*OVERRIDE)}."
            + in_words(f" `marl run {file.parent} --resume` goes on with the run's own config.", "")
        )
    return [
        f"config changed{f' ({in_words(*OVERRIDE)})' if key in serious else ''}: {line}" for key, line in lines.items()
    ]


def _defaults(config: RunConfig, was: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The options' defaults of each strategy that was named before, too: written out or left out they mean the same."""
    for path, choice in all_choices_in(config):
        key = dotted(path)
        if isinstance(choice.use, str) and was.get(f"{key}.use", choice.default_use) == choice.use:
            yield {**flatten(default_options(type(choice.resolve())), key), f"{key}.use": choice.default_use}


def _flat(text: str, source: str) -> dict[str, Any]:
    """A config's values by dotted key; an empty section is left out."""
    return {key: value for key, value in flatten(with_long_choices(parse_yaml(text, source))).items() if value != {}}
