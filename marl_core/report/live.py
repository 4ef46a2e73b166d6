"""report.html while the run is going: written anew now and then, reloading itself, and a last time when the run ends."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

MIN_SECONDS = 10.0
"""The page isn't written more often than this."""
SHARE_OF_TIME = 0.02
"""Of a run's time that writing pages may take: the larger the page, the less often it is written."""


class LiveReport:
    """The page of one run that is going. A page that can't be drawn stops nothing: the one at the end says why."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._due = 0.0

    def update(self) -> None:
        """Write the page, if it is time to."""
        began = time.monotonic()
        if began < self._due:
            return
        self._write(live=True)
        now = time.monotonic()
        self._due = now + max(MIN_SECONDS, (now - began) / SHARE_OF_TIME)

    def close(self) -> None:
        """Write the page of a run that was stopped or has failed: it reloads no more, and says how it ended."""
        if self._due:
            self._write(live=False)

    def _write(self, live: bool) -> None:
        from marl_core.report.page import write_report

        with suppress(Exception):  # a damaged line of an older session, a full disk
            write_report(self.folder, live=live)
