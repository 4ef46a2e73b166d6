"""curves.png and a self-contained report.html of a run folder."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marl_core.errors import DataError
from marl_core.run.files import read_lines, write_text

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
    steps = list(read_lines(folder / "steps.jsonl"))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not steps:
        return None
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    for place, (name, title) in enumerate(CURVES):
        axes = figure.add_subplot(2, 3, place + 1)
        points = [(line["step"], line[name]) for line in steps if name in line]
        axes.plot([x for x, _ in points], [y for _, y in points], color="#2563eb", linewidth=1.6)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.set_xlabel("PPO step", fontsize=8)
    file = folder / "curves.png"
    figure.savefig(file, dpi=110)
    return file


def write_report(folder: str | Path) -> Path:
    """Write report.html beside a run's files. DataError when the folder holds no run."""
    path = Path(folder)
    if not (path / "config.yaml").is_file():
        raise DataError(f"report: {path} holds no run (no config.yaml). Give the run.folder of a run.")
    try:
        page = _page(path)
        write_text(path / "report.html", page)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        raise DataError(
            f"report: a file in {path} is damaged or can't be written ({type(error).__name__}: {error}). "
            "Each line of steps.jsonl, evals.jsonl and samples.jsonl is one JSON object; preflight.json and provenance.json are one each."
        ) from error
    return path / "report.html"


def _page(path: Path) -> str:
    write_curves(path)
    parts = [
        "<!doctype html><meta charset='utf-8'><title>marl report</title>",
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}"
        "td,th{border-bottom:1px solid #ddd;padding:.3rem .6rem;text-align:left;vertical-align:top}"
        "pre{background:#f6f6f6;padding:1rem;overflow:auto}</style>",
        f"<h1>{html.escape(path.name)}</h1>",
        _picture(path / "curves.png"),
        _checks(path / "preflight.json"),
        _evaluations(list(read_lines(path / "evals.jsonl"))),
        _samples(list(read_lines(path / "samples.jsonl"))[-24:]),
        "<h2>Config</h2><pre>" + html.escape((path / "config.yaml").read_text(encoding="utf-8")) + "</pre>",
        _json("Provenance", path / "provenance.json"),
    ]
    return "\n".join(parts)


def _picture(file: Path) -> str:
    import base64

    if not file.is_file():
        return "<p>No curves: no steps yet, or matplotlib isn't installed (pip install 'marl-core[curves]').</p>"
    return f"<img style='width:100%' alt='curves' src='data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}'>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(_show(value))}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def _show(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _checks(file: Path) -> str:
    if not file.is_file():
        return ""
    checks: Sequence[Mapping[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["checks"]
    return "<h2>Pre-flight</h2>" + _table(
        ("check", "", "finding"), [(c["name"], "ok" if c["ok"] else "note", c["detail"]) for c in checks]
    )


def _evaluations(lines: Sequence[Mapping[str, Any]]) -> str:
    if not lines:
        return ""
    judges = sorted(lines[0]["judges"])
    rows = [
        [e["step"], e["reward"], e["kl"], e["length"], *(e["judges"][name]["mean"] for name in judges)] for e in lines
    ]
    return "<h2>Held out</h2>" + _table(("step", "reward", "KL (nats)", "length", *judges), rows)


def _samples(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (s["step"], s["prompt"], s["response"], s["score"], s["kl_nats"] if s["kl_nats"] is not None else "")
        for s in lines
    ]
    return "<h2>Last samples</h2>" + _table(("step", "prompt", "response", "score", "KL"), rows) if rows else ""


def _json(title: str, file: Path) -> str:
    return f"<h2>{title}</h2><pre>{html.escape(file.read_text(encoding='utf-8'))}</pre>" if file.is_file() else ""
