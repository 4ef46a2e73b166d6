"""Long sentences on a terminal break between words; in a pipe or file a sentence stays one line, to be searched and counted."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

MIN_WIDTH = 40
"""Columns below which a terminal's width is not believed."""


def wrapped(text: str, stream: Any) -> str:
    """`text` as it is to be written to `stream`: on a terminal its lines are broken between words, with their indentation kept.

    A word that is longer than a line, such as a path, stays whole, so that it can be copied.
    """
    if not getattr(stream, "isatty", lambda: False)():
        return text
    width = max(shutil.get_terminal_size().columns, MIN_WIDTH)
    return "\n".join(_wrapped_line(line, width) for line in text.split("\n"))


def _wrapped_line(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(
        line.strip(),
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
