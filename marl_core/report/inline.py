"""The report inside a notebook: the same page, in a frame of its own."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    runs = [run for given in folders for run in ([given] if isinstance(given, str | Path) else given)]
    return Report(write_report(runs), height)
