"""What importing a plugin may not change: the random state, the working folder, torch's settings."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def process_kept() -> Iterator[list[str]]:
    """A block that leaves the process as it was; what had to be put back is in the list, in words, once it has ended."""
    undone: list[str] = []
    before = [(name, read(), put) for name, read, put in _settings()]
    try:
        yield undone
    finally:
        for (name, old, put), (_, read, _) in zip(before, _settings(), strict=False):
            if old is not None and read() != old:
                put(old)
                undone.append(name)


def _folder() -> str | None:
    """The working folder; None when somebody deleted it."""
    try:
        return os.getcwd()
    except OSError:
        return None


def _settings() -> list[tuple[str, Callable[[], Any], Callable[[Any], Any]]]:
    """Name, reader and writer of each; torch's only if torch has been imported, for here nothing imports it."""
    found: list[tuple[str, Callable[[], Any], Callable[[Any], Any]]] = [
        ("Python's random state", random.getstate, random.setstate),
        ("the working folder", _folder, os.chdir),
    ]
    torch: Any = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_num_threads"):
        found += [
            (
                "torch's random state",
                lambda: torch.get_rng_state().tolist(),
                lambda old: torch.set_rng_state(torch.ByteTensor(old)),
            ),
            ("the number of threads", torch.get_num_threads, torch.set_num_threads),
            ("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
            ("gradient mode", torch.is_grad_enabled, torch.set_grad_enabled),
        ]
    return found
