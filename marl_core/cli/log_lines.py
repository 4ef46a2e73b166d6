"""The lines of the loggers below `marl` on the command line: what a start reads and checks, and what -v asks for."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from marl_core.logs import LOADING, NAME, PREFLIGHT

VERBOSE_OPTIONS = {"-v": 1, "--verbose": 1, "-vv": 2, "-vvv": 2}
"""What each adds: 1 shows milestones and what libraries say, 2 phases with their seconds too."""
_VERBOSE: ContextVar[bool] = ContextVar("marl_verbose", default=False)
STARTS = {LOADING: "loading     ", PREFLIGHT: "pre-flight  "}


def verbosity(arguments: list[str]) -> int:
    """How much the arguments ask for: 0, 1 or 2."""
    return min(2, sum(VERBOSE_OPTIONS.get(argument, 0) for argument in arguments))


@contextmanager
def start_shown() -> Iterator[None]:
    """A block in which standard output gets a line for each thing that is loaded, and each pre-flight check."""
    with _handled(list(STARTS), _StartLines(), logging.INFO):
        yield


@contextmanager
def log_shown(level: int) -> Iterator[None]:
    """A block in which standard error gets milestones (1), or phases too (2); nothing for 0."""
    if not level:
        yield
        return
    token = _VERBOSE.set(True)
    try:
        with _handled([NAME], _LogLines(), logging.INFO if level == 1 else logging.DEBUG):
            yield
    finally:
        _VERBOSE.reset(token)


def is_verbose() -> bool:
    """Whether the command was called with -v, which keeps what libraries say."""
    return _VERBOSE.get()


class _StartLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """One line, as the table above it; sys.stdout as it is now, which --quiet may have replaced."""
        from rich.console import Console
        from rich.text import Text

        ok = getattr(record, "ok", None)
        mark = "" if ok is None else Text("ok    ", "green") if ok else Text("note  ", "yellow")
        console = Console(highlight=False)
        line = Text(STARTS[record.name]).append(mark).append(record.getMessage())
        console.print(line, soft_wrap=not console.is_terminal)
        record.shown = True


class _LogLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """One line. sys.stderr as it is now: beside a bar it is rich's, which writes above the bar."""
        if not getattr(record, "shown", False):
            from marl_core.config.redact import redact

            print(f"{record.name}: {redact(record.getMessage())}", file=sys.stderr)


@contextmanager
def _handled(names: list[str], handler: logging.Handler, level: int) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    before = [each.level for each in loggers]
    for each in loggers:
        each.addHandler(handler)
        each.setLevel(min(level, each.level or level))
    try:
        yield
    finally:
        for each, was in zip(loggers, before, strict=True):
            each.removeHandler(handler)
            each.setLevel(was)
