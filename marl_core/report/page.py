"""The report: one self-contained HTML page about one or several runs. It loads nothing, from no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from marl_core.config.flatten import flatten
from marl_core.errors import DataError, MarlError
from marl_core.report.charts import COLORS, charts
from marl_core.report.run_data import RunData, read_runs
from marl_core.report.samples import Samples, tokens, turns
from marl_core.store.files import write_text


def write_report(folders: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page about these runs; its path.

    By default RUN/report.html, for several runs comparison.html in the first one's folder. DataError when a folder holds no
    run, or a file in it is damaged.
    """
    paths = [folders] if isinstance(folders, str | Path) else list(folders)
    try:
        runs = read_runs(paths)
        target = Path(out) if out else runs[0].folder / ("report.html" if len(runs) == 1 else "comparison.html")
        write_text(target, page(runs))
    except MarlError:
        raise
    except Exception as error:  # damaged numbers may break the drawing anywhere
        places = ", ".join(str(folder) for folder in paths)
        raise DataError(
            f"report: a file in {places} is damaged or can't be written ({type(error).__name__}: {error}). "
            "Each line of steps.jsonl, evals.jsonl and samples.jsonl is one JSON object; preflight.json and provenance.json are one each."
        ) from error
    return target


def page(runs: Sequence[RunData]) -> str:
    """The whole page as text."""
    templates = Environment(
        loader=FunctionLoader(_resource),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"number": number, "flatten": flatten, "json": _json, "turns": turns, "tokens": tokens}
    return templates.get_template("page.html.jinja").render(
        runs=list(runs),
        title=" · ".join(run.name for run in runs),
        charts=charts(runs),
        differences=differences(runs),
        phases=Phases.of(runs),
        judges=sorted({name for run in runs for line in run.evaluations for name in line["judges"]}),
        samples=Samples.of(runs),
        css=_resource("report.css"),
        js=_resource("report.js"),
        COLORS=COLORS,
    )


@dataclass(frozen=True, slots=True)
class Phases:
    """Where a step's seconds go: for each run the mean seconds by phase, drawn to one scale."""

    runs: Sequence[Mapping[str, float]]
    names: Sequence[str]
    longest: float

    @classmethod
    def of(cls, runs: Sequence[RunData]) -> Phases:
        """Of all runs."""
        seconds_by_phase = [run.phases() for run in runs]
        names = list(dict.fromkeys(name for seconds in seconds_by_phase for name in seconds))
        return cls(seconds_by_phase, names, max(sum(seconds.values()) for seconds in seconds_by_phase))


def differences(runs: Sequence[RunData]) -> list[tuple[str, list[Any]]]:
    """Config keys that differ between the runs, each with its value in every run."""
    flat = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [(key, [config.get(key) for config in flat]) for key in keys]
    return [(key, values) for key, values in rows if len({repr(value) for value in values}) > 1]


def number(value: Any) -> str:
    """Three or four digits that matter; a dash for what isn't there."""
    if value is None or value != value:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        return f"{value:.2e}"
    if size >= 1000 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.3g}" if size >= 100 else f"{value:.3f}"


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _resource(name: str) -> str:
    return files("marl_core.report").joinpath(name).read_text(encoding="utf-8")
