"""The page's parts beside curves and samples: summary, seconds by phase, held-out evaluation, pre-flight, provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from marl_core.report.charts import COLORS, charts
from marl_core.report.markup import Child, Markup, number, section, table, tag
from marl_core.report.run_data import RunData

PHASE = "perf/seconds_"


def chip(runs: Sequence[RunData], index: int) -> Markup:
    """A run's name in its colour."""
    return tag("span", runs[index].name, class_=f"chip ink-{index % COLORS}")


def summary(runs: Sequence[RunData]) -> Markup:
    """One row a run: what it is, and its numbers at the start and at the end."""
    heads = ("run", "steps", "reward", "KL", "clip", "length", "stopped", "s a step", "tokens/s")
    rows = []
    for index, run in enumerate(runs):
        model = run.config.get("model")
        base = str(model.get("path", "")) if isinstance(model, Mapping) else ""
        wanted = (run.config.get("ppo") or {}).get("steps")
        done = f"{run.steps[-1]['step'] if run.steps else 0} of {wanted}"
        rows.append(
            [
                [chip(runs, index), tag("div", base, class_="dim")],
                done,
                _change(run, "objective/scores"),
                _change(run, "objective/kl"),
                number(run.ends("policy/clipfrac")[1]),
                _change(run, "tokens/mean_length"),
                _change(run, "tokens/finished"),
                number(run.mean("perf/seconds")),
                number(run.mean("perf/tokens_per_second")),
            ]
        )
    note = "First tenth of the steps (at least one) → last tenth, means over training batches."
    return section("Summary", table(heads, rows, class_="figures"), note=note)


def _change(run: RunData, metric: str) -> Child:
    first, last = run.ends(metric)
    return "–" if first is None else [tag("span", f"{number(first)} → ", class_="dim"), tag("b", number(last))]


def curves(runs: Sequence[RunData]) -> Markup | None:
    """All cards, by group."""
    groups = charts(runs)
    if not groups:
        return tag("section", tag("p", "No steps yet.", class_="note"))
    legend = tag("p", [chip(runs, index) for index in range(len(runs))], class_="legend") if len(runs) > 1 else None
    return section("Curves", legend, [[tag("h3", title), tag("div", cards, class_="cards")] for title, cards in groups])


def phases(runs: Sequence[RunData]) -> Markup | None:
    """Where a step's seconds go: one bar a run, drawn to one scale."""
    found = [_phases(run) for run in runs]
    names = list(dict.fromkeys(name for run in found for name in run))
    longest = max((sum(run.values()) for run in found), default=0.0)
    if not names or not longest:
        return None
    bars = []
    for index, run in enumerate(found):
        parts = [
            tag(
                "span",
                f"{name} {number(spent)} s" if spent / longest > 0.12 else None,
                class_=f"phase p-{names.index(name) % 6}",
                style=f"width:{spent / longest:.2%}",
                title=f"{name}: {spent:.3f} s a step",
            )
            for name, spent in run.items()
        ]
        who = chip(runs, index) if len(runs) > 1 else None
        bars.append(
            tag(
                "div",
                tag("div", who, tag("b", number(sum(run.values()))), " s a step", class_="barhead"),
                tag("div", parts, class_="bar"),
            )
        )
    keys = [tag("span", tag("i", class_=f"p-{index % 6}"), name) for index, name in enumerate(names)]
    return section("Seconds by phase", bars, tag("p", keys, class_="keys"))


def _phases(run: RunData) -> dict[str, float]:
    names = list(dict.fromkeys(name for line in run.steps for name in line if name.startswith(PHASE)))
    return {name.removeprefix(PHASE): run.mean(name) or 0.0 for name in names}


def evaluations(runs: Sequence[RunData]) -> Markup | None:
    """Held-out numbers, each evaluation a row."""
    rows: list[list[Child]] = []
    judges = sorted({name for run in runs for line in run.evaluations for name in line["judges"]})
    for index, run in enumerate(runs):
        for line in run.evaluations:
            spreads = [
                _spread(line["judges"].get(name, {}).get("mean"), line["judges"].get(name, {}).get("std"))
                for name in judges
            ]
            rows.append(
                [
                    *([chip(runs, index)] if len(runs) > 1 else []),
                    number(line["step"]),
                    _spread(line["reward"], line.get("reward_std")),
                    _spread(line["kl"], line.get("kl_std")),
                    _spread(line["length"], line.get("length_std")),
                    *spreads,
                ]
            )
    if not rows:
        return None
    heads = (*(["run"] if len(runs) > 1 else []), "step", "reward", "KL, nats", "length", *judges)
    return section(
        "Held out", table(heads, rows, class_="figures"), note="Mean ± standard deviation over sampling seeds."
    )


def _spread(mean: Any, std: Any) -> Child:
    return [number(mean), tag("span", f" ± {number(std)}", class_="dim") if std else None]


def preflight(runs: Sequence[RunData]) -> Markup | None:
    """What was measured before the first update."""
    lists = []
    for index, run in enumerate(runs):
        found = [
            tag(
                "li",
                tag("span", "ok" if check["ok"] else "note", class_="ok" if check["ok"] else "warn"),
                tag("b", check["name"]),
                " ",
                check["detail"],
            )
            for check in run.checks
        ]
        lists.append(
            [
                chip(runs, index) if len(runs) > 1 and found else None,
                tag("ul", found, class_="checks") if found else None,
            ]
        )
    return (
        section("Pre-flight", lists, note="Measured on real prompts before the first update.")
        if any(run.checks for run in runs)
        else None
    )


def differences(runs: Sequence[RunData]) -> Markup | None:
    """Config keys that differ between the runs."""
    if len(runs) < 2:
        return None
    flat = [flatten(run.config) for run in runs]
    keys = [
        key
        for key in dict.fromkeys(key for one in flat for key in one)
        if len({repr(one.get(key)) for one in flat}) > 1
    ]
    heads = ["key", *(chip(runs, index) for index in range(len(runs)))]
    rows = [[tag("code", key), *(_value(one.get(key)) for one in flat)] for key in keys]
    body = table(heads, rows) if rows else tag("p", "The configs are the same.", class_="note")
    return section("What differs", body)


def flatten(value: Any, place: str = "") -> dict[str, Any]:
    """Nested mappings and lists as dotted keys."""
    if isinstance(value, Mapping) and value:
        inner = value.items()
    elif isinstance(value, list) and value and not all(isinstance(item, str | int | float) for item in value):
        inner = enumerate(value)  # type: ignore[assignment]  # positions are keys too
    else:
        return {place: value}
    return {
        key: leaf
        for name, part in inner
        for key, leaf in flatten(part, f"{place}.{name}" if place else str(name)).items()
    }


def _value(value: Any) -> Child:
    return tag("span", "–", class_="dim") if value is None else str(value)


def provenance(runs: Sequence[RunData]) -> Markup:
    """Where the numbers come from, and the whole config, folded."""
    parts: list[Child] = []
    for index, run in enumerate(runs):
        rows = [[tag("code", key), _value(value)] for key, value in flatten(run.provenance).items()]
        raw = json.dumps(run.provenance, indent=2, ensure_ascii=False)
        parts += [
            tag("h3", chip(runs, index)) if len(runs) > 1 else None,
            table(("what", "value"), rows, class_="plain") if rows else None,
            tag("details", tag("summary", "config.yaml"), tag("pre", run.config_text)),
            tag("details", tag("summary", "provenance.json"), tag("pre", raw)) if rows else None,
        ]
    return section("Provenance", parts)
