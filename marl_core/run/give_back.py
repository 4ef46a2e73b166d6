"""Freed memory goes back to the system: large blocks at once, the rest between phases.

glibc keeps what was freed for later, in a heap that only shrinks from its end, and before 2.38 it doesn't find freed blocks again for
aligned requests, as all of torch's are. Left to itself it also raises, up to 32 MiB, the size from which a block gets pages of its
own. Activations come in many sizes: with gradient checkpointing the holes between them were larger than they.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache


LARGE = 2**20
"""Bytes from which a block gets pages of its own: fewer would cost time, and below it holes are small."""
_MMAP_THRESHOLD = -3  # glibc's name for it in mallopt
_OWN_WISH = "MALLOC_MMAP_THRESHOLD_"  # the environment variable with which a user says it


@cache
def large_blocks_alone() -> bool:
    """Let every block of a MiB or more be returned as soon as it is freed, in this whole process; whether this C library can."""
    if _OWN_WISH in os.environ:
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, LARGE))
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False


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
