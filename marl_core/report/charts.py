"""Curves as cards: one small picture a metric, all runs in it. What is drawn where; card.html.jinja draws it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

from marl_core.report.run_data import RunData

WIDTH, HEIGHT = 340, 170
LEFT, RIGHT, TOP, BOTTOM = 46, WIDTH - 8, 8, HEIGHT - 22
MAX_POINTS = 400
COLORS = 6

GROUPS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Outcome",
        (
            ("objective/scores", "reward"),
            ("objective/kl", "KL to the reference, nats a response"),
            ("objective/entropy", "entropy, nats a token"),
            ("tokens/mean_length", "response length, tokens"),
            ("tokens/finished", "share that stopped by itself"),
            ("objective/rlhf_reward", "reward minus KL penalty"),
        ),
    ),
    (
        "Update",
        (
            ("policy/clipfrac", "clip fraction"),
            ("policy/approx_kl", "KL old to new policy, nats a token"),
            ("policy/grad_norm", "gradient norm, policy"),
            ("val/explained_var", "explained variance of the value"),
            ("val/loss", "value loss"),
            ("objective/kl_coef", "KL coefficient"),
        ),
    ),
    ("Speed", (("perf/seconds", "seconds a step"), ("perf/tokens_per_second", "response tokens a second"))),
)

Point = tuple[float, float]
Tick = tuple[float, str]


@dataclass(frozen=True, slots=True)
class Curve:
    """One run's curve: its points in pixels, the numbers as JSON [[step, value], ...], and the last value."""

    name: str
    ink: int
    points: Sequence[Point]
    values: str
    last: float


@dataclass(frozen=True, slots=True)
class Card:
    """A metric's picture: curves, and the ticks of the axes as (pixels, label). Steps run from `low` to `high`."""

    metric: str
    label: str
    lines: Sequence[Curve]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    low: float
    high: float
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP
    bottom: int = BOTTOM


def charts(runs: Sequence[RunData]) -> list[tuple[str, list[Card]]]:
    """Cards by group; reward sources get one each when there are several. A metric nobody wrote has none."""
    sources = sorted({name for run in runs for line in run.steps for name in line if name.startswith("reward/")})
    groups = [(title, list(metrics)) for title, metrics in GROUPS]
    if len(sources) > 1:
        groups.insert(1, ("Rewards", [(name, name.removeprefix("reward/")) for name in sources]))
    drawn = [
        (title, [card for name, label in metrics if (card := _card(runs, name, label))]) for title, metrics in groups
    ]
    return [(title, cards) for title, cards in drawn if cards]


def _card(runs: Sequence[RunData], metric: str, label: str) -> Card | None:
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
            thin = _thinned(curve)
            values = json.dumps([[x, float(f"{y:.5g}")] for x, y in thin], separators=(",", ":"))
            points = [(across(x), up(y)) for x, y in thin]
            lines.append(Curve(runs[index].name, index % COLORS, points, values, curve[-1][1]))
    return Card(
        metric,
        label,
        lines,
        [(across(x), _tick(x)) for x in x_ticks if low_x <= x <= high_x],
        [(up(y), _tick(y)) for y in y_ticks],
        low_x,
        high_x,
    )


def _thinned(curve: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    thin = curve[:: max(1, ceil(len(curve) / MAX_POINTS))]
    return thin if thin[-1] == curve[-1] else [*thin, curve[-1]]


def ticks(low: float, high: float, count: int, integers: bool = False) -> list[float]:
    """Round numbers that cover [low, high] in about `count` steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    raw = (high - low) / count
    power = 10.0 ** floor(log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw * 0.999)
    step = max(1.0, step) if integers else step
    first, last = floor(low / step), ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _tick(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.4g}"
