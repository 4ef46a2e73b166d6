"""curves.png of a run folder, where matplotlib is installed."""

from __future__ import annotations

import io
from pathlib import Path

from marl_core.report.run_data import read_steps
from marl_core.store.files import write_bytes

CURVES = (
    ("objective/scores", "mean reward"),
    ("objective/kl", "KL to the reference (nats per response)"),
    ("policy/clipfrac", "clip fraction"),
    ("objective/entropy", "entropy (nats per token)"),
    ("val/explained_var", "explained variance"),
    ("tokens/mean_length", "response length (tokens)"),
)


def write_curves(folder: Path) -> Path | None:
    """Draw the curves of steps.jsonl; None without steps, or without matplotlib (extra: curves)."""
    steps = read_steps(folder)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not steps:
        return None
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    for index, (name, title) in enumerate(CURVES):
        axes = figure.add_subplot(2, 3, index + 1)
        points = [(line["step"], line[name]) for line in steps if line.get(name) is not None]
        axes.plot([x for x, _ in points], [y for _, y in points], color="#2563eb", linewidth=1.6)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.set_xlabel("PPO step", fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    file = folder / "curves.png"
    write_bytes(file, picture.getvalue())
    return file
