"""The report inside a notebook: the same page, in a frame of its own."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marl_core.errors import DataError
from marl_core.report.page import write_report


@dataclass(frozen=True, slots=True)
class Report:
    """A written report. As the last line of a notebook's cell it is shown there; `path` is the HTML file."""

    path: Path
    height: int = 720
    """Height of the frame in pixels; the page scrolls inside it."""

    def _repr_html_(self) -> str:
        """What notebooks show: the page itself, not a link to it, so that it also works where the notebook's folder isn't served."""
        page = html.escape(self.path.read_text(encoding="utf-8"))
        style = "border: 1px solid #8884; border-radius: 6px"
        return f'<iframe srcdoc="{page}" width="100%" height="{self.height}" style="{style}" title="report"></iframe>'


def show_report(*folders: str | Path | Sequence[str | Path], height: int = 720) -> Report:
    """Write the report of one or several runs, as `write_report` does, and show it in a notebook.

    Run folders one by one, or in a list. `height`: of the frame, in pixels. DataError when a folder holds no run, or a file in it is
    damaged.
    """
    runs = [run for given in folders for run in _listed(given)]
    if not runs:
        raise DataError("show_report: it shows run folders, and none was given. Give the run.folder of a run.")
    return Report(write_report(runs), height)


def _listed(given: Any) -> list[str | Path]:
    """The run folders of one argument; DataError for what is none."""
    listed: list[Any] = [given]
    if isinstance(given, Iterable) and not isinstance(given, str | Path):
        listed = list(given)
    if not all(isinstance(run, str | Path) for run in listed):
        raise DataError(
            f"show_report: {given!r} is no run folder. Give the run.folder of a run, or several; and a height by its name."
        )
    return listed
