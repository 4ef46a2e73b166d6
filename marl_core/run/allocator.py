"""How the C library holds a run's memory: large blocks apart from small ones, and freed ones back to the system between phases.

glibc keeps what was freed for later, and before 2.38 it doesn't find freed blocks again for aligned requests, as all of torch's are: what
one phase, or one layer computed again, has freed would stay resident beside what the next one needs. And in half precision
the kernels made for each shape of a product are kept; rows of unequal length give a new shape nearly every time.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

SWITCH = "THP_MEM_ALLOC_ENABLE"
"""Torch's own: blocks of 2 MiB and more begin at a page, and the system is asked for huge pages there."""
KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's own, and that of torch's layer above it: for how many shapes each keeps kernels; 1,024 unless told."""
FEW = "32"  # a pass forward and backward meets about 20 shapes; each kernel holds 0.6 MiB (figures in docs/speed.md)
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def set_up_process() -> None:
    """Both settings below, for a process that is marl's own: the command line, or a script that calls this before its first tensor.

    They are environment variables, which children of the process get too. So importing marl sets none of them: a program
    that marl is a part of decides for itself.
    """
    align_large_blocks()
    keep_few_kernels()


def align_large_blocks() -> None:
    """Turn torch's switch on, unless the user has set it or the system knows no huge pages. Torch reads it at its first large tensor."""
    if HUGE_PAGES.exists():
        os.environ.setdefault(SWITCH, "1")


def keep_few_kernels() -> None:
    """Let oneDNN and torch forget kernels of shapes long gone, unless the user has set how many they keep.

    Both read this at their first product.
    """
    for name in KERNELS:
        os.environ.setdefault(name, FEW)


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
