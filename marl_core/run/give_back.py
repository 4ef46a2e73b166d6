"""Freed memory goes back to the system between phases.

glibc keeps what was freed for later, and before 2.38 it doesn't find freed blocks again for aligned requests, as all of torch's are: what
one phase has freed would stay resident beside what the next one needs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; None with another C library."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None
    return trim


def give_back() -> bool:
    """Return freed pages to the system, in milliseconds; whether this C library can."""
    trim = _trim()
    if trim is not None:
        trim(0)
    return trim is not None
