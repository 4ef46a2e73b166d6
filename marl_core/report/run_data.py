"""What a run folder holds, read for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marl_core.config.yaml_text import parse_yaml
from marl_core.errors import ConfigError, DataError
from marl_core.report.metric_notes import PHASE_PREFIX
from marl_core.store.files import read_lines
from marl_core.store.lock import is_held

Line = Mapping[str, Any]

RENAMED_METRICS = {"policy/approxkl": "policy/approx_kl"}
"""Old names of metrics, in folders of earlier versions, and their names now."""
BESIDE = ("step", "time")
"""What stands in a line of steps.jsonl beside its metrics."""
MAX_SAMPLES = 240
"""Samples of one run that a page holds; of more, evenly many over the run are left out."""


@dataclass(frozen=True, slots=True)
class RunData:
    """One run: its config and everything that was written while it ran."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    config_text: str
    steps: Sequence[Line]
    samples: Sequence[Line]
    evaluations: Sequence[Line]
    checks: Sequence[Line]
    provenance: Mapping[str, Any]
    ended: Mapping[str, Any] = field(default_factory=dict)
    """How the run ended (ended.json); empty while it is going, after a crash, and of older versions."""
    live: bool = False
    """Whether it is going while this is read."""
    samples_written: int = 0
    """Lines of samples.jsonl; `samples` are at most MAX_SAMPLES of them."""

    def has(self, name: str) -> bool:
        """Whether a file or folder of that name lies in the run folder."""
        return (self.folder / name).exists()

    @property
    def base(self) -> str:
        """What the config names as the base model; empty when it names none."""
        model = self.config.get("model")
        return str(model.get("path", "")) if isinstance(model, Mapping) else ""

    @property
    def done(self) -> int:
        """The last step that was written; 0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, where it was written as a number."""
        return [(line["step"], float(line[metric])) for line in self.steps if isinstance(line.get(metric), int | float)]

    def ends(self, metric: str) -> tuple[float | None, float | None]:
        """Mean of a metric over the first and over the last tenth of the steps, each at least one step."""
        values = [value for _, value in self.curve(metric)]
        if not values:
            return None, None
        count = self.tenth(metric)
        return sum(values[:count]) / count, sum(values[-count:]) / count

    def tenth(self, metric: str) -> int:
        """Steps that `ends` takes the means over."""
        return max(1, len(self.curve(metric)) // 10)

    def mean(self, metric: str) -> float | None:
        """Mean of a metric over all steps."""
        values = [value for _, value in self.curve(metric)]
        return sum(values) / len(values) if values else None

    def phases(self) -> dict[str, float]:
        """Mean seconds of a step by phase, in the order they were written."""
        names = dict.fromkeys(name for line in self.steps for name in line if name.startswith(PHASE_PREFIX))
        return {name.removeprefix(PHASE_PREFIX): self.mean(name) or 0.0 for name in names}


def read_runs(folders: Sequence[str | Path], live: bool | None = None) -> list[RunData]:
    """All runs, each under a name that tells it from the others. DataError for a folder that holds no run.

    `live`: whether they are going; by default a run is when a process holds its folder.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    names = [path.resolve().name for path in paths]
    shown = [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]
    return [_read(path, name, live) for path, name in zip(paths, shown, strict=True)]


def _read(path: Path, name: str, live: bool | None) -> RunData:
    if not (path / "config.yaml").is_file():
        raise DataError(f"report: {path} holds no run (no config.yaml). Give the run.folder of a run.")
    text = (path / "config.yaml").read_text(encoding="utf-8")
    try:
        config = parse_yaml(text, "config.yaml")
    except ConfigError as error:
        raise ValueError(str(error).rstrip(".")) from error
    samples, written = read_samples(path / "samples.jsonl")
    return RunData(
        name=name,
        folder=path,
        config=config if isinstance(config, dict) else {},
        config_text=text,
        steps=read_steps(path),
        samples=samples,
        evaluations=list(read_lines(path / "evals.jsonl")),
        checks=_json(path / "preflight.json").get("checks", []),
        provenance=_json(path / "provenance.json"),
        ended=_json(path / "ended.json"),
        live=is_held(path) if live is None else live,
        samples_written=written,
    )


def read_samples(file: Path) -> tuple[list[Line], int]:
    """At most MAX_SAMPLES lines of samples.jsonl, evenly over the file with its first and last, and how many it has.

    The file is never in memory as a whole: a long run writes hundreds of megabytes, and the page is drawn while it trains.
    """
    if not file.is_file():
        return [], 0
    starts: list[int] = []
    found: list[Line] = []
    with file.open("rb") as stream:
        position = 0
        for line in stream:
            if line.strip():
                starts.append(position)
            position += len(line)
        for index in evenly(len(starts), MAX_SAMPLES):
            stream.seek(starts[index])
            with suppress(ValueError):  # cut short by a crash, or just being written
                value = json.loads(stream.readline())
                if isinstance(value, dict) and isinstance(value.get("step"), int):
                    found.append(value)
    return found, len(starts)


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the indices of `count` things, evenly over them, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """The lines of steps.jsonl, every metric under the name it has now."""
    return [
        {RENAMED_METRICS.get(name, name): value for name, value in line.items()}
        for line in read_lines(folder / "steps.jsonl")
    ]


def _json(file: Path) -> dict[str, Any]:
    value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(value, dict):
        raise TypeError(f"{file.name} holds a {type(value).__name__}")
    return value
