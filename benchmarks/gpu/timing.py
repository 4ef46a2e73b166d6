"""Seconds, memory and differences, measured the same way in every part."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def wait(device: str) -> None:
    """Until the device has done what it was asked to."""
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True, slots=True)
class Timed:
    """Median and extremes of several runs, in seconds, and the memory that one needed beside what was there before, in MiB."""

    seconds: float
    fastest: float
    slowest: float
    runs: int
    peak_mib: float | None
    """None on a CPU."""

    def figures(self, name: str = "", digits: int = 4) -> dict[str, Any]:
        """As a row's figures: milliseconds and MiB, each name with `name` before it."""
        start = f"{name}_" if name else ""
        found = {f"{start}ms": round(self.seconds * 1e3, digits), f"{start}ms_min": round(self.fastest * 1e3, digits)}
        return found if self.peak_mib is None else {**found, f"{start}peak_mib": round(self.peak_mib, 1)}


def timed(work: Callable[[], object], device: str, *, repeat: int = 5, warm: int = 1, at_most: float = 1.0) -> Timed:
    """The median of `repeat` runs after `warm` others; fewer, but one at least, once `at_most` seconds are over.

    The device is waited for before and after each, so what is measured is what a caller would wait.
    """
    for _ in range(warm):
        work()
    wait(device)
    before = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times: list[float] = []
    begin = time.perf_counter()
    while not times or (len(times) < repeat and time.perf_counter() - begin < at_most):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if device == "cuda" else None
    return Timed(statistics.median(times), min(times), max(times), len(times), peak)


def apart(found: Tensor, plain: Tensor) -> float:
    """The largest absolute difference."""
    return float((found.float() - plain.float()).abs().max())


def relative(found: Sequence[Tensor], plain: Sequence[Tensor]) -> float:
    """The length of the difference over that of the plain one, all tensors taken as one vector."""
    gap = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, plain, strict=True))
    whole = sum(float(b.double().square().sum()) for b in plain)
    return (gap / whole) ** 0.5 if whole else float(gap > 0)
