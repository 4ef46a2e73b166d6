"""How the command line says marl's own warnings: one line on stderr, as it says errors; all others are Python's to show."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from marl_core.cli.wrapping import wrapped
from marl_core.errors import MarlDeprecationWarning, MarlWarning

MARL_WARNINGS = (MarlWarning, MarlDeprecationWarning)


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """While the block runs, `marl: warning: ...` and no file and no source line; a live progress bar stays below it."""
    original = warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if file is not None or not issubclass(category, MARL_WARNINGS):
            original(message, category, filename, lineno, file, line)
            return
        from marl_core.config.redact import redact

        text = " ".join(redact(str(message)).split())
        # sys.stderr as it is now: beside a bar it is rich's, which writes above the bar
        line = f"marl: warning: {text}".encode("utf-8", "backslashreplace").decode()
        print(wrapped(line, sys.stderr), file=sys.stderr)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = original
