"""The study's figures, from `results/` alone: SVG files in docs/figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from arms import HERE
from results import Results

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "marl", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False})

import matplotlib.pyplot as plt  # noqa: E402  # after the backend is chosen

FIGURES = HERE.parent.parent / "docs" / "figures"
LABELS = {
    "reward": "reward",
    "kl": "KL to the reference, nats",
    "kl_sft": "KL to the SFT model, nats",
    "kl_raw": "KL to the raw base, nats",
    "perplexity": "perplexity under the SFT model",
    "vader": "VADER compound (judge)",
    "vader_positive": "share VADER calls positive",
    "distinct": "share of trigrams of one's own",
    "entropy": "entropy, nats per token",
    "clipfrac": "clip fraction",
    "explained_var": "explained variance",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito


CURVES = {  # file: arms, and a panel for each number
    "study-convergence": (("adapter", "four"), ("reward", "vader", "kl", "clipfrac", "entropy", "explained_var")),
    "study-references": (("a", "b", "c", "d"), ("reward", "kl_sft", "kl_raw", "perplexity")),
    "study-values": (("head", "adapter", "rloo", "grpo"), ("reward", "kl", "explained_var")),
    "study-hacking": (("kl-low", "head", "kl-high"), ("reward", "vader_positive", "distinct", "perplexity")),
}
FRONTIERS = {
    "study-frontier": ("a", "b", "c", "d"),
    "study-sensitivity": ("head", "kl-low", "kl-high", "lr-low", "lr-high", "rank-4"),
}


def draw_all(results: Results, folder: Path = FIGURES) -> list[Path]:
    """Draw every figure; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    curves = [draw_curves(results, *what, folder / f"{name}.svg") for name, what in CURVES.items()]
    return curves + [draw_frontier(results, arms, folder / f"{name}.svg") for name, arms in FRONTIERS.items()]


def draw_curves(results: Results, arms: Sequence[str], metrics: Sequence[str], file: Path) -> Path:
    """Mean over seeds with a band of one standard deviation, a panel for each number."""
    columns = 3 if len(metrics) in (3, 6) else 2
    rows = -(-len(metrics) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.7 * columns + 0.5, 2.1 * rows + 0.3), layout="constrained", squeeze=False
    )
    for panel, metric in zip(axes.flat, metrics, strict=True):
        for colour, arm in zip(COLOURS, [arm for arm in arms if arm in results.arms()], strict=False):
            _band(panel, results.curve(arm, metric), colour, arm)
        panel.set(xlabel="step", title=LABELS[metric])
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return _save(figure, file)


def _band(panel: Any, curve: dict[int, Any], colour: str, label: str) -> None:
    if not curve:
        return
    steps, spreads = list(curve), list(curve.values())
    panel.plot(
        steps,
        [s.mean for s in spreads],
        color=colour,
        label=label,
        linewidth=1.2,
        marker="o" if len(steps) < 8 else None,
        markersize=3,
    )
    low, high = [s.mean - (s.std or 0.0) for s in spreads], [s.mean + (s.std or 0.0) for s in spreads]
    panel.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)


def draw_frontier(results: Results, arms: Sequence[str], file: Path) -> Path:
    """Held-out reward and judge against KL to the SFT model: every evaluation of every seed, lines through the means."""
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.8), layout="constrained")
    for panel, metric in zip(axes, ("reward", "vader"), strict=True):
        for colour, arm in zip(COLOURS, [arm for arm in arms if arm in results.arms()], strict=False):
            mine = [row for row in results.evals if row["arm"] == arm]
            panel.scatter(
                [r["kl_sft"] for r in mine], [r[metric] for r in mine], color=colour, s=5, alpha=0.5, linewidths=0
            )
            kl, score = results.curve(arm, "kl_sft"), results.curve(arm, metric, held_out=True)
            panel.plot(
                [s.mean for s in kl.values()], [s.mean for s in score.values()], color=colour, linewidth=1.2, label=arm
            )
        panel.set(xlabel="KL to the SFT model, nats per response", title=f"held-out {LABELS[metric]}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return _save(figure, file)


def _save(figure: Any, file: Path) -> Path:
    figure.savefig(file, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    file.write_text(
        "\n".join(line.rstrip() for line in file.read_text(encoding="utf-8").splitlines()) + "\n", encoding="utf-8"
    )
    return file
