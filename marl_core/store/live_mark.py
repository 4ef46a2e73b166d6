"""How a report that was written while its run was going is told from the last one."""

from __future__ import annotations

from pathlib import Path

LIVE_MARK = "data-live"
"""Stands at the head of a report that was written while its run was going: such a one doesn't say that the run has ended."""
LIVE_MARK_WITHIN = 200
"""Bytes at the head of a report in which the mark stands."""


def is_last_page(report: Path) -> bool:
    """Whether a report is there that was written at the end, not on the way."""
    if not report.is_file():
        return False
    with report.open("rb") as stream:
        return LIVE_MARK.encode() not in stream.read(LIVE_MARK_WITHIN)
