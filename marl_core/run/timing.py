"""Seconds by phase, and torch's threads for a block."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def timed(seconds: dict[str, float], phase: str, device: torch.device) -> Iterator[None]:
    """Add the seconds of a block to a phase, those included that `device` still computes when the block's last line is done."""
    _finish(device)
    start = time.perf_counter()
    try:
        yield
    finally:
        _finish(device)
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def as_alone() -> Iterator[None]:
    """A block that computes as it does by itself, whatever block of torch's the caller stands in: no_grad, inference_mode, autocast."""
    with ExitStack() as blocks:
        blocks.enter_context(torch.inference_mode(False))
        blocks.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            blocks.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Compute with so many threads in a block, as many as before when None."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
