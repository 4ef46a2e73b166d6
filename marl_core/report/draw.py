"""Curves and report of a run folder, drawn at the end of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from marl_core.errors import warn
from marl_core.report import curves, page


def draw(folder: Path) -> None:
    """Write curves and report; what can't be drawn is a warning: the run is whole without them."""
    drawings: tuple[tuple[str, Callable[[Path], object]], ...] = (
        ("curves.png", curves.write_curves),
        ("report.html", lambda run: page.write_report(run, live=False)),
    )
    for name, write in drawings:
        try:
            write(folder)
        except Exception as error:  # a drawing library may raise anything
            warn(
                f"{name} could not be written into {folder} ({type(error).__name__}: {error}). The run is whole: final/ and its "
                f"checkpoints are written. Remove the cause and draw again: marl report {folder}"
            )
