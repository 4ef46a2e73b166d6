"""The report: one self-contained HTML page about one or several runs. It loads nothing, from no network."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from marl_core.artifacts import addresses
from marl_core.config.flatten import flatten
from marl_core.errors import counted
from marl_core.report.before_after import BeforeAfter
from marl_core.report.charts import COLORS, charts
from marl_core.report.facts import facts
from marl_core.report.faults import damage_told, write_output
from marl_core.report.metric_notes import METRICS_PAGE, MetricNote, note_of
from marl_core.report.run_data import RunData, read_runs
from marl_core.report.samples import Samples, tokens, turns
from marl_core.report.timeline import Timeline, date, duration, why_no_steps
from marl_core.report.values import embedded, metrics
from marl_core.store.live_mark import LIVE_MARK

RELOAD_SECONDS = 10
"""How often the page of a run that is going reloads itself."""
SCRIPTS = ("curves.js", "tables.js", "live.js")


def write_report(
    folders: str | Path | Sequence[str | Path], out: str | Path | None = None, live: bool | None = None
) -> Path:
    """Write the page about these runs; its path.

    By default RUN/report.html, for several runs comparison.html in the first one's folder. `live`: whether the runs are going, so
    that the page reloads itself; by default a run is when a process holds its folder. DataError when a folder holds no run, a
    file in it is damaged, or the page can't be written.
    """
    paths = [folders] if isinstance(folders, str | Path) else list(folders)
    with damage_told(paths):
        runs = read_runs(paths, live)
        target = Path(out) if out else runs[0].folder / ("report.html" if len(runs) == 1 else "comparison.html")
        text = page(runs)
    write_output(target, text)
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
    templates.filters |= {
        "number": number,
        "flatten": flatten,
        "json": _json,
        "turns": turns,
        "tokens": tokens,
        "more": _more,
        "duration": duration,
        "count": counted,
        "why_no_steps": why_no_steps,
        "columns": _columns,
    }
    timelines = [Timeline.of(run) for run in runs]
    return templates.get_template("page.html.jinja").render(
        runs=list(runs),
        title=" · ".join(run.name for run in runs),
        timelines=timelines,
        facts=[facts(run, timeline) for run, timeline in zip(runs, timelines, strict=True)],
        remarks=[remarks(run) for run in runs],
        charts=charts(runs, [timeline.resumes for timeline in timelines]),
        differences=differences(runs),
        phases=Phases.of(runs),
        several_seeds=any(_seeds(run) > 1 for run in runs),
        judges=sorted({name for run in runs for line in run.evaluations for name in line["judges"]}),
        comparison=BeforeAfter.of(runs),
        samples=Samples.of(runs),
        metrics=[(name, note_of(name)) for name in metrics(runs)],
        note_of=note_of,
        metrics_page=METRICS_PAGE,
        values=embedded(runs, timelines),
        live_mark=LIVE_MARK,
        reload_seconds=RELOAD_SECONDS if len(runs) == 1 and runs[0].live else 0,
        written=date(time.time()),
        css=_resource("report.css"),
        js="\n".join(map(_resource, SCRIPTS)),
        COLORS=COLORS,
    )


def remarks(run: RunData) -> list[tuple[str, float, str]]:
    """Metrics whose mean over the last tenth of the steps isn't normal: name, that mean, and what it means."""
    found = []
    for name in metrics([run]):
        note = note_of(name)
        value = run.ends(name)[1] if note is not None else None
        if note is not None and value is not None and (text := note.remark(value, run.done)):
            found.append((name, value, text))
    return found


def _seeds(run: RunData) -> int:
    """Sampling seeds of the run's evaluations."""
    section = run.config.get("eval")
    found = section.get("seeds") if isinstance(section, Mapping) else None
    return found if isinstance(found, int) else 1


def _more(note: MetricNote) -> str | None:
    """The address of what docs/metrics.md says of a metric; None while the project has no address."""
    anchor = "".join(letter for letter in note.name.lower() if letter.isalnum() or letter in "-_")
    return addresses.page("metrics", anchor)


def _columns(line: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The data's columns beside a sample, where the run wrote them."""
    row = line.get("row")
    return list(row.items()) if isinstance(row, Mapping) else []


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
