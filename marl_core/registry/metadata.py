"""Package metadata that nobody can read: one line about it, instead of an error in whatever looks at all packages.

pydantic (at the first model) and torch (at its import) list the entry points of every installed package: with one damaged
`entry_points.txt` of any package both raise, so `marl` couldn't start to say whose fault it is, and the catalog's own guard would
never be reached. `tests/strangers/test_faults.py` tries it in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata


def unreadable(distribution: metadata.Distribution, error: Exception) -> str:
    """The line about a package whose entry points can't be read."""
    path = getattr(distribution, "_path", "a package")
    reason = " ".join(str(error).split())[:120]
    return f"{path}: its entry points can't be read ({type(error).__name__}: {reason}), so its plugins are passed over; reinstall it"


_reported: set[str] = set()  # one line a process


@contextmanager
def damaged_metadata_passed_over() -> Iterator[None]:
    """For the command line: while the block runs, a package with damaged entry points has none, and one line says so."""
    original = metadata.Distribution.__dict__["entry_points"]

    def entry_points(self: metadata.Distribution) -> metadata.EntryPoints:
        try:
            entry_points_read: metadata.EntryPoints = original.fget(self)
        except Exception as error:
            line = unreadable(self, error)
            if line not in _reported:
                _reported.add(line)
                print(f"marl: {line}", file=sys.stderr)
            return metadata.EntryPoints(())
        return entry_points_read

    metadata.Distribution.entry_points = property(entry_points)  # type: ignore[method-assign,assignment]  # for this block
    try:
        yield
    finally:
        metadata.Distribution.entry_points = original  # type: ignore[method-assign]  # as it was
