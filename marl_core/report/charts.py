"""Curves as cards: one small picture a metric, all runs in it. What is drawn where; card.html.jinja draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

from marl_core.report.metric_notes import REWARD_PREFIX, MetricNote, note_of
from marl_core.report.run_data import RunData, evenly
from marl_core.report.values import metrics

WIDTH, HEIGHT = 340, 170
LEFT, RIGHT, TOP, BOTTOM = 46, WIDTH - 8, 8, HEIGHT - 22
MAX_POINTS = 400
COLORS = 6
MAX_OWN = 24
"""Charts of numbers that reward functions logged."""

GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "Outcome",
        (
            "objective/scores",
            "objective/kl",
            "objective/entropy",
            "tokens/mean_length",
            "tokens/finished",
            "objective/rlhf_reward",
        ),
    ),
    (
        "Update",
        (
            "policy/clipfrac",
            "policy/approx_kl",
            "policy/grad_norm",
            "val/explained_var",
            "val/loss",
            "objective/kl_coef",
        ),
    ),
    ("Speed", ("perf/seconds", "perf/tokens_per_second")),
)
"""The charts by group; what a chart is called, and what is normal in it, metric_notes.py says."""

Point = tuple[float, float]
Tick = tuple[float, str]


@dataclass(frozen=True, slots=True)
class Curve:
    """One run's curve: its points in pixels, the last value, and what is unusual about the mean of the last tenth of the steps."""

    name: str
    ink: int
    points: Sequence[Point]
    last: float
    remark: str


@dataclass(frozen=True, slots=True)
class Card:
    """A metric's picture: curves, the ticks of the axes as (pixels, label), and where runs were resumed as (pixels, ink, step)."""

    metric: str
    label: str
    note: MetricNote | None
    lines: Sequence[Curve]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    resumed: Sequence[tuple[float, int, int]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP
    bottom: int = BOTTOM


def charts(runs: Sequence[RunData], resumes: Sequence[Sequence[int]] = ()) -> list[tuple[str, list[Card]]]:
    """Cards by group; reward sources get one each when there are several. A metric nobody wrote has none.

    `resumes`: of each run the steps after which it was resumed.
    """
    sources = sorted({name for run in runs for line in run.steps for name in line if name.startswith(REWARD_PREFIX)})
    groups = list(GROUPS)
    if len(sources) > 1:
        groups.insert(1, ("Rewards", tuple(sources)))
    own = sorted(name for name in metrics(runs) if note_of(name) is None)
    if own:
        groups.insert(-1, ("Logged by rewards", tuple(own[:MAX_OWN])))
    drawn = [(title, [card for name in names if (card := _card(runs, name, resumes))]) for title, names in groups]
    return [(title, cards) for title, cards in drawn if cards]


def _label(metric: str, note: MetricNote | None) -> str:
    if note is None or metric.startswith(REWARD_PREFIX):
        return metric.removeprefix(REWARD_PREFIX)
    return f"{note.label}, {note.unit}" if note.unit and note.unit not in note.label else note.label


def _card(runs: Sequence[RunData], metric: str, resumes: Sequence[Sequence[int]]) -> Card | None:
    note = note_of(metric)
    curves = [[(x, y) for x, y in run.curve(metric) if isfinite(y)] for run in runs]
    xs = [x for curve in curves for x, _ in curve]
    ys = [y for curve in curves for _, y in curve]
    if not xs or (metric == "objective/kl_coef" and len(set(ys)) == 1):
        return None
    x_ticks, y_ticks = ticks(min(xs), max(xs), 5, integers=True), ticks(min(ys), max(ys), 4)
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1)
    low_y, high_y = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def across(x: float) -> float:
        return round(LEFT + (x - low_x) / (high_x - low_x) * (RIGHT - LEFT), 1)

    def up(y: float) -> float:
        return round(BOTTOM - (y - low_y) / (high_y - low_y) * (BOTTOM - TOP), 1)

    lines = []
    for index, curve in enumerate(curves):
        if curve:
            points = [(across(curve[i][0]), up(curve[i][1])) for i in evenly(len(curve), MAX_POINTS)]
            remark = note.remark(runs[index].ends(metric)[1], runs[index].done) if note else ""
            lines.append(Curve(runs[index].name, index % COLORS, points, curve[-1][1], remark))
    return Card(
        metric,
        _label(metric, note),
        note,
        lines,
        [(across(x), _tick(x)) for x in x_ticks if low_x <= x <= high_x],
        [(up(y), _tick(y)) for y in y_ticks],
        [
            (across(step), index % COLORS, step)
            for index, steps in enumerate(resumes)
            for step in steps
            if low_x <= step <= high_x
        ],
    )


def ticks(low: float, high: float, count: int, integers: bool = False) -> list[float]:
    """Round numbers that cover [low, high] in about `count` steps of 1, 2 or 5 times a power of ten."""
    if not high - low > 1e-9 * max(abs(low), abs(high)):  # equal, or apart by less than a tick could tell
        low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    raw = (high - low) / count
    power = 10.0 ** floor(log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw * 0.999)
    step = max(1.0, step) if integers else step
    first, last = floor(low / step), ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _tick(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.4g}"
