"""The first Ctrl-C or SIGTERM asks for a stop; a bar may have hidden the cursor, and the second leaves nobody to show it."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from marl_core.run.signals import SHOW_CURSOR, StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("terminal", [True, False])
def test_the_cursor_is_shown_before_a_second_one_may_come(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, terminal: bool
) -> None:
    written: list[bytes] = []

    def write(file: int, content: Any) -> int:
        assert file == 2
        written.append(bytes(content))
        return len(content)

    with monkeypatch.context() as patch, StopRequest() as asked:
        patch.setattr(os, "write", write)
        patch.setattr(os, "isatty", lambda file: terminal)
        signal.raise_signal(number)
        assert signal.getsignal(number) == signal.SIG_DFL  # the second is the system's
    assert asked.signal == number
    (said,) = written
    assert b"stopping after this step (once more stops at once, without what came after the last checkpoint)" in said
    assert said.startswith(SHOW_CURSOR.encode()) == terminal
