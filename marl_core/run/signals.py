"""Ctrl-C and SIGTERM: the first asks for a stop at the next safe point, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = "\x1b[?25h"
"""A progress bar hides the cursor, and after the second signal nobody is left to show it again."""


class StopRequest:
    """A block during which a signal sets `signal` instead of breaking the run wherever it is.

    After the first, the system's own handling is back: a second ends the process at once, even inside a long kernel,
    and the shell sees 130 or 143. What was saved stays whole. Outside the main thread, where Python allows no
    handlers, the block changes nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for stop_signal in SIGNALS:
            signal.signal(stop_signal, signal.SIG_DFL)
        cursor = SHOW_CURSOR if os.isatty(2) else ""
        lost = "what came after the last checkpoint"
        message = (
            f"{cursor}\nmarl: {self.signal.name}: stopping after this step (once more stops at once, without {lost})\n"
        )
        os.write(2, message.encode())  # not print: the signal may have come in the middle of one
