"""Curves as inline SVG: one small picture a metric, all runs in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import ceil, floor, isfinite, log10

from marl_core.report.markup import Markup, number, tag
from marl_core.report.run_data import RunData

WIDTH, HEIGHT = 340, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22
MOST_POINTS = 400
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
            ("policy/approxkl", "KL old to new policy, nats a token"),
            ("policy/grad_norm", "gradient norm, policy"),
            ("val/explained_var", "explained variance of the value"),
            ("val/loss", "value loss"),
            ("objective/kl_coef", "KL coefficient"),
        ),
    ),
    ("Speed", (("perf/seconds", "seconds a step"), ("perf/tokens_per_second", "response tokens a second"))),
)


def charts(runs: Sequence[RunData]) -> list[tuple[str, list[Markup]]]:
    """Cards by group; reward sources get one each when there are several. A metric nobody wrote has none."""
    sources = sorted({name for run in runs for line in run.steps for name in line if name.startswith("reward/")})
    groups = [(title, list(metrics)) for title, metrics in GROUPS]
    if len(sources) > 1:
        groups.insert(1, ("Rewards", [(name, name.removeprefix("reward/")) for name in sources]))
    drawn = [
        (title, [card for name, label in metrics if (card := _card(runs, name, label))]) for title, metrics in groups
    ]
    return [(title, cards) for title, cards in drawn if cards]


def _card(runs: Sequence[RunData], metric: str, label: str) -> Markup | None:
    curves = [[(x, y) for x, y in run.curve(metric) if isfinite(y)] for run in runs]
    points = [point for curve in curves for point in curve]
    if not points or (metric == "objective/kl_coef" and len({y for _, y in points}) == 1):
        return None
    lines = [tag("span", number(curve[-1][1]), class_=f"ink-{i % COLORS}") for i, curve in enumerate(curves) if curve]
    picture = _picture(curves, [run.name for run in runs])
    head = tag("figcaption", tag("b", label), tag("span", lines, class_="last"))
    return tag("figure", head, picture, class_="card", title=metric)


def _picture(curves: Sequence[Sequence[tuple[int, float]]], names: Sequence[str]) -> Markup:
    xs = [x for curve in curves for x, _ in curve]
    ys = [y for curve in curves for _, y in curve]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 5, whole=True), ticks(min(ys), max(ys), 4)
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1)
    low_y, high_y = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        up = HEIGHT - BOTTOM - (y - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(up, 1)

    grid = []
    for y in y_ticks:
        _, at = place(low_x, y)
        grid += [
            tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at),
            tag("text", _tick(y), x=LEFT - 6, y=at + 3, class_="y"),
        ]
    for x in x_ticks:
        if low_x <= x <= high_x:
            grid.append(tag("text", _tick(x), x=place(x, low_y)[0], y=HEIGHT - 6, class_="x"))
    drawn = [_line(curve, index, names[index], place) for index, curve in enumerate(curves) if curve]
    rule = tag("line", class_="rule", x1=0, x2=0, y1=TOP, y2=HEIGHT - BOTTOM)
    box = f"0 0 {WIDTH} {HEIGHT}"
    return tag(
        "svg", tag("g", grid, class_="grid"), drawn, rule, viewBox=box, role="img", data_low=low_x, data_high=high_x
    )


def _line(curve: Sequence[tuple[int, float]], index: int, name: str, place: object) -> Markup:
    thin = curve[:: max(1, ceil(len(curve) / MOST_POINTS))]
    thin = [*thin, curve[-1]] if thin[-1] != curve[-1] else list(thin)
    places = [place(x, y) for x, y in thin]  # type: ignore[operator]  # a closure of two numbers
    values = json.dumps([[x, float(f"{y:.5g}")] for x, y in thin], separators=(",", ":"))
    ink = index % COLORS
    if len(places) == 1:
        return tag(
            "circle",
            cx=places[0][0],
            cy=places[0][1],
            r=2.5,
            class_=f"dot ink-{ink}",
            data_name=name,
            data_values=values,
        )
    text = " ".join(f"{x:g},{y:g}" for x, y in places)
    return tag("polyline", points=text, class_=f"line ink-{ink}", data_name=name, data_values=values)


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Round numbers that cover [low, high] in about `count` steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    raw = (high - low) / count
    power = 10.0 ** floor(log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw * 0.999)
    step = max(1.0, step) if whole else step
    first, last = floor(low / step), ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _tick(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.4g}"
