"""Where in the user's own code a reward function failed, and what it had been given: a note on the error."""

from __future__ import annotations

import inspect
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STANDARD_ARGUMENTS = ("prompts", "completions", "completion_ids")


@contextmanager
def noting_origin(function: Callable[..., Any], arguments: Iterable[str]) -> Iterator[None]:
    """Add a note to an error of `function`, called with these keyword `arguments`: where it was raised, and what was given."""
    try:
        yield
    except (Exception, SystemExit) as error:
        error.add_note(raised_from(error, function) + _arguments_sentence(list(arguments)))
        raise


def raised_from(error: BaseException, function: Callable[..., Any] | None = None) -> str:
    """The last frame in the user's code, which may have called torch or another library from there; empty when there is none."""
    own = None if function is None else getattr(inspect.unwrap(function), "__code__", None)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if (own is not None and frame.filename == own.co_filename) or not _is_library(frame.filename)
    ]
    if not frames:
        return ""
    last = frames[-1]
    line = f": `{last.line}`" if last.line else ""
    inside = "" if last.name.startswith("<") else f", in {last.name}"
    return f"It was raised from {_short(last.filename)}, line {last.lineno}{inside}{line}. "


def _is_library(file: str) -> bool:
    """Whether a file is Python's, an installed package's, or of this package."""
    path = Path(file)
    library_folders = [Path(__file__).parent, *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))]
    return (
        file.startswith("<")
        or not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
        or any(path.is_relative_to(folder) for folder in library_folders)
    )


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


def _arguments_sentence(names: list[str]) -> str:
    columns = sorted(set(names) - set(STANDARD_ARGUMENTS))
    standard = ", ".join(name for name in STANDARD_ARGUMENTS if name in names)
    of_data = f"the data's columns {', '.join(columns)}" if columns else "no columns of the data"
    return f"The function was given {' and '.join(filter(None, (standard, of_data)))}."
