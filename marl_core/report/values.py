"""All numbers of the steps as columns: embedded in the page for its charts and downloads, and as a CSV file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from marl_core.report.faults import damage_told, write_output
from marl_core.report.run_data import BESIDE, RunData, read_runs
from marl_core.report.timeline import Timeline, date

MAX_STEPS = 3000
"""Steps of one run that a page holds; of a longer one evenly many are left out."""
DIGITS = 7
"""Digits that matter; what is beyond is below float32's precision."""


def embedded(runs: Sequence[RunData], timelines: Sequence[Timeline]) -> str:
    """The values of all runs as JSON that may stand inside a page's script element."""
    value = {"runs": [_columns(run, timeline) for run, timeline in zip(runs, timelines, strict=True)]}
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _columns(run: RunData, timeline: Timeline) -> dict[str, Any]:
    stride = max(1, ceil(len(run.steps) / MAX_STEPS))
    lines = list(run.steps[::stride])
    if lines and lines[-1] is not run.steps[-1]:
        lines.append(run.steps[-1])
    return {
        "name": run.name,
        "stride": stride,
        "resumed": list(timeline.resumes),
        "steps": [line["step"] for line in lines],
        "time": [_rounded(line.get("time"), 12) for line in lines],
        "elapsed": [_rounded(timeline.elapsed(line.get("time")), 9) for line in lines],
        "values": {name: [_rounded(line.get(name)) for line in lines] for name in metrics([run])},
    }


def metrics(runs: Sequence[RunData]) -> list[str]:
    """Names of all numbers that were written, in their order."""
    names = (
        name
        for run in runs
        for line in run.steps
        for name, value in line.items()
        if name not in BESIDE and isinstance(value, int | float)
    )
    return list(dict.fromkeys(names))


def write_csv(folders: Sequence[str | Path], file: Path) -> Path:
    """Every number of every step as a CSV file, one line a step; a column `run` where there are several runs.

    DataError when a folder holds no run, a file in it is damaged, or `file` can't be written.
    """
    with damage_told(folders):
        runs = read_runs(folders)
        names = metrics(runs)
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow([*(["run"] if len(runs) > 1 else []), "step", "time", "date", "elapsed", *names])
        table.writerows(row for run in runs for row in _rows(run, names, len(runs) > 1))
    write_output(file, text.getvalue())
    return file


def _rows(run: RunData, names: Sequence[str], several: bool) -> Iterator[list[Any]]:
    timeline = Timeline.of(run)
    for line in run.steps:
        head, at = [run.name] if several else [], line.get("time")
        elapsed = _rounded(timeline.elapsed(at), 9)
        yield [*head, line["step"], at, date(at), elapsed, *(line.get(name) for name in names)]


def _rounded(value: Any, digits: int = DIGITS) -> Any:
    if not isinstance(value, int | float) or value != value or value in (float("inf"), float("-inf")):
        return None
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
