"""A file of JSON lines on a disk that may be full: what can't be written waits in memory, and nothing is half-written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from marl_core import append_lines


class Lines:
    """Appends JSON objects, one a line, in order."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.waiting: list[dict[str, Any]] = []

    def append(self, rows: Iterable[dict[str, Any]]) -> OSError | None:
        """Write these rows after those that still wait; the error if the disk doesn't take them, and then all of them wait."""
        pending = [*self.waiting, *rows]
        try:
            append_lines(self.file, pending)
        except OSError as error:
            self.waiting = pending
            return error
        self.waiting = []
        return None
