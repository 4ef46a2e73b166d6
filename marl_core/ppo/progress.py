"""How far a phase of a step is, told to whoever listens: the code that works says where it is, and knows no listener.

    with phase("scoring"), phase("reference"):
        advance(8, 64)  # the listener hears "scoring: reference", 8, 64

Without a listener, which is a program's usual state, a call costs the reading of a variable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

Listener: TypeAlias = Callable[[str, int, int], None]
"""Told the phase, how much of it is done, and how much there is."""

_LISTENER: ContextVar[Listener | None] = ContextVar("marl_progress_listener", default=None)
_PHASES: ContextVar[tuple[str, ...]] = ContextVar("marl_progress_phases", default=())
_PART: ContextVar[tuple[int, int]] = ContextVar("marl_progress_part", default=(0, 1))


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """A block whose phases are told to `listener`; to nobody when it is None."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A block that is one phase; inside another one it is called by both: `evaluation: sampling`."""
    names, whole = _PHASES.set((*_PHASES.get(), name)), _PART.set((0, 1))
    try:
        yield
    finally:
        _PHASES.reset(names)
        _PART.reset(whole)


@contextmanager
def part(index: int, count: int) -> Iterator[None]:
    """A block that is part `index` (from 0) of `count` equal parts of the phase, and counts for itself."""
    token = _PART.set((index, count))
    try:
        yield
    finally:
        _PART.reset(token)


def advance(done: int, total: int) -> None:
    """Tell that `done` of `total` of the current phase is done; nothing outside of a phase."""
    listener, names = _LISTENER.get(), _PHASES.get()
    if listener is None or not names:
        return
    index, count = _PART.get()
    listener(": ".join(names), index * total + done, count * total)
