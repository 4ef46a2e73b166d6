"""A file of JSON lines on a disk that may be full: what can't be written waits in memory, and nothing is half-written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def strict(row: Any, **options: Any) -> str:
    """JSON that every reader takes: a number that isn't finite, which JSON hasn't, is null. `options`: further ones of `json.dumps`."""
    options = {"ensure_ascii": False, **options, "allow_nan": False}
    try:
        return json.dumps(row, **options)
    except ValueError:
        return json.dumps(_finite(row), **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


class Lines:
    """Appends JSON objects, one a line, in order."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.waiting: list[str] = []

    def append(self, rows: Iterable[dict[str, Any]]) -> OSError | None:
        """Write these rows after those that still wait; the error if the disk doesn't take them, and then all of them wait."""
        self.waiting += [strict(row) + "\n" for row in rows]
        try:
            self._write("".join(self.waiting).encode("utf-8"))
        except OSError as error:
            return error
        self.waiting = []
        return None

    def _write(self, content: bytes) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab", buffering=0) as stream:
            before = os.fstat(stream.fileno()).st_size
            try:
                left = memoryview(content)
                while left:
                    left = left[stream.write(left) :]
            except OSError:
                os.ftruncate(stream.fileno(), before)  # half a line would make the file unreadable
                raise
