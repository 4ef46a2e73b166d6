"""The study's figures, from `results/` alone: SVG files in docs/figures."""

import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
from kinds import HERE, read_kinds, read_tasks
from measured import Measured

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "marl", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False})

import matplotlib.pyplot as plt  # noqa: E402  # after the backend is chosen

FIGURES = HERE.parent.parent / "docs" / "figures"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
PANELS = {
    "ranks and rates": ("lora-1", "lora-4", "lora-16", "lora-64", "rslora", "lora-plus-16", "lora-plus-2"),
    "other kinds": ("lora-16", "dora", "miss", "oft", "hra", "pissa"),
    "few numbers": ("lora-16", "ia3", "tinylora", "vera", "road"),
}


def draw_all(measured: Measured, folder: Path = FIGURES) -> list[Path]:
    """Draw every figure; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [draw_frontier(measured, task, folder / f"{frontier(task)}.svg") for task in measured.tasks()]
    return [*drawn, draw_rate(measured, folder / f"{RATE}.svg")]


def frontier(task: str) -> str:
    """A task's figure."""
    return f"adapters-{task}"


RATE = "adapters-one-rate"


def draw_frontier(measured: Measured, task: str, file: Path) -> Path:
    """Held-out reward against KL to the reference, at each kind's best rate: dots of all seeds, a line through their means."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(8.6, 3.0), layout="constrained", sharex=True, sharey=True)
    for panel, (title, kinds) in zip(axes, PANELS.items(), strict=True):
        for colour, kind in zip(COLOURS, kinds, strict=False):
            if kind in measured.kinds(task):
                _frontier(panel, [row["evals"] for row in measured.best_runs(task, kind)], colour, kind)
        panel.set(xlabel="KL to the reference, nats per response", title=title)
        panel.legend(frameon=False, fontsize=6)
    axes[0].set(ylabel=f"held out: {read_tasks()[task].answer}")
    return _save(figure, file)


def _frontier(panel: Any, runs: Sequence[Sequence[dict[str, Any]]], colour: str, label: str) -> None:
    rows = sorted((row for run in runs for row in run), key=lambda row: row["step"])
    panel.scatter([r["kl"] for r in rows], [r["reward"] for r in rows], color=colour, s=4, alpha=0.4, linewidths=0)
    means = [
        (statistics.fmean(r["kl"] for r in group), statistics.fmean(r["reward"] for r in group))
        for group in (list(found) for _, found in groupby(rows, key=lambda row: row["step"]))
        if len(group) == len(runs)
    ]
    panel.plot([kl for kl, _ in means], [reward for _, reward in means], color=colour, linewidth=1.1, label=label)


def draw_rate(measured: Measured, file: Path) -> Path:
    """The same kinds at one rate and at their best: held-out reward against the size of a first step at that one rate."""
    tasks = measured.tasks()
    figure, axes = plt.subplots(
        1, max(1, len(tasks)), figsize=(4.3 * max(1, len(tasks)), 3.0), layout="constrained", squeeze=False
    )
    for panel, task in zip(axes.flat, tasks, strict=False):
        found = {kind: measured.at_one_rate(task, kind) for kind in measured.kinds(task)}
        there = {kind: row for kind, row in found.items() if row}
        steps = [measured.step_at(task, kind, row["rate"]) for kind, row in there.items()]
        ones = [measured.score(row) for row in there.values()]
        bests = [statistics.fmean(measured.scores(task, kind)) for kind in there]
        panel.vlines(steps, ones, bests, color="#999999", linewidth=0.6)
        panel.scatter(steps, ones, color=COLOURS[1], s=14, label="at one rate for all")
        panel.scatter(steps, bests, color=COLOURS[0], s=14, label="at its best rate")
        for kind, step, one in zip(there, steps, ones, strict=True):
            panel.annotate(kind, (step, one), fontsize=5, xytext=(2, -6), textcoords="offset points")
        panel.set(
            xscale="log", xlabel="first step at that one rate, nats a token", title=task,
            ylabel=f"held out: {read_tasks()[task].answer}",
        )  # fmt: skip
        panel.legend(frameon=False, fontsize=6)
    return _save(figure, file)


def unknown() -> set[str]:
    """Kinds that no panel shows."""
    return set(read_kinds()) - {kind for kinds in PANELS.values() for kind in kinds}


def _save(figure: Any, file: Path) -> Path:
    figure.savefig(file, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
    return file
