"""What a foreign config said, what was taken over, and why the rest was not."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from marl_core import Catalog, ConfigError

NO_SUCH_SETTING = "marl has no such setting"


@dataclass
class ForeignConfig:
    """The keys that nobody has taken over yet, and notes on what was changed on the way."""

    remaining: dict[str, Any]
    notes: list[tuple[str, str]] = field(default_factory=list)

    def take(self, *names: str, default: Any = None) -> Any:
        """The value of the first of these keys that is there; all of them count as taken over."""
        values = [self.remaining.pop(name) for name in names if name in self.remaining]
        return next((value for value in values if value is not None), default)

    def number(self, *names: str, default: float | None = None) -> Any:
        """The same as a number; whole ones as int. YAML reads 1e-5 as a text."""
        value = self.take(*names, default=default)
        if value is None or isinstance(value, bool):
            return value
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{names[0]}: {value!r} is not a number.") from None
        return int(number) if number.is_integer() and not isinstance(value, float) else number

    def note(self, key: str, why: str) -> None:
        """Say that a key was not taken over, or not as it was."""
        self.notes.append((key, why))

    def refused(self, reasons: Mapping[str, str]) -> list[tuple[str, str]]:
        """All notes, and every key that nobody took, with its reason; those that change nothing stand last."""
        key_reasons = [*self.notes, *((key, reasons.get(key, NO_SUCH_SETTING)) for key in self.remaining)]
        return sorted(key_reasons, key=lambda pair: pair[1].startswith("not needed"))


def offers(family: Any, name: str) -> bool:
    """Whether a strategy of this name is installed."""
    return any(listing.name == name for listing in Catalog.installed().listings(family))


def rows_of(file: str) -> int | None:
    """Rows of a local json, json-lines or csv file; None when that can't be told cheaply."""
    path = Path(file).expanduser()
    if path.suffix not in (".json", ".jsonl", ".csv") or not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.suffix == ".csv":
                return sum(1 for _ in csv.DictReader(stream))
            if path.suffix == ".jsonl":
                return sum(1 for line in stream if line.strip())
            rows = json.load(stream)
            return len(rows) if isinstance(rows, list) else None
    except (OSError, ValueError, csv.Error):
        return None


def steps_of(foreign: ForeignConfig, epochs_key: str, epochs: float, rows: int | None, batch: int) -> int | None:
    """PPO steps that so many passes over so many prompts make; None, with a note, when the rows aren't known."""
    if rows:
        return max(1, ceil(epochs * ceil(rows / batch)))
    foreign.note(
        epochs_key,
        f"marl counts PPO steps: set ppo.steps to {epochs:g} x prompts / {batch}; the prompts can't be counted here",
    )
    return None


def warm_up(
    foreign: ForeignConfig, steps: int | None, ratio_key: str = "warmup_ratio", steps_key: str = "warmup_steps"
) -> int | None:
    """PPO steps of warm-up, given as a number or as a share of all steps."""
    count, ratio = foreign.number(steps_key), foreign.number(ratio_key)
    if count:
        return int(count)
    if ratio and steps:
        rounded = round(float(ratio) * steps)
        if rounded == 0:
            foreign.note(ratio_key, f"{ratio:g} of {steps} steps rounds to 0: there is no warm-up (ppo.warmup_steps)")
        return rounded
    if ratio:
        foreign.note(ratio_key, f"is {ratio:g} of the steps: set ppo.warmup_steps once ppo.steps is known")
    return None


def without_none(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section without the keys that nobody set."""
    return {key: value for key, value in section.items() if value is not None}


def run_sections(foreign: ForeignConfig, trackers: Collection[str], seed: int) -> dict[str, Any]:
    """Sections observers and run: trackers where some were named, folder, seed and how often to save."""
    reporters = foreign.take("report_to", "log_with", default=[])
    names = [name for name in ([reporters] if isinstance(reporters, str) else reporters) if name in trackers]
    observers: list[Any] = ["console", "json-lines"]
    run = {
        "folder": foreign.take("output_dir", default="runs/imported"),
        "seed": foreign.number("seed", default=seed),
        "checkpoint_every": foreign.number("save_steps"),
    }
    return {
        "observers": [*observers, {"use": "trackers", "to": names}] if names else observers,
        "run": without_none(run),
    }
