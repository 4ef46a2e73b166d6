"""Where in the code of a plugin, or of the user, an exception was raised, for messages."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from marl_core.registry.callables import MAIN, definition_of

OURS = ("marl_core", "marl_plugins")
BEGINNING = "It was raised from "


def raised_from(error: BaseException, whose: Callable[..., object] | type | str | None = None) -> str:
    """A sentence with file, line and source line of the last frame in code that isn't a library's; empty where there is none.

    That frame may have called torch or another library. `whose`: a function, a class, or a module's name, whose package counts
    as the user's own, installed or not.
    """
    module = whose if isinstance(whose, str) or whose is None else getattr(definition_of(whose), "__module__", None)
    package = _package(str(module or ""))
    own = package if package not in OURS else ""
    places = [
        (frame.filename, frame.lineno, frame.name, frame.line)
        for (code_frame, _), frame in zip(_frames(error), traceback.extract_tb(error.__traceback__), strict=True)
        if _is_own(code_frame, own)
    ]
    if not places:
        return ""
    file, number, name, source = places[-1]
    line = f": `{source}`" if source else ""
    inside = "" if name.startswith("<") else f", in {name}"
    return f"{BEGINNING}{_short(file)}, line {number}{inside}{line}. "


def origin_and_notes(error: BaseException, whose: Callable[..., object] | type | None = None) -> list[str]:
    """What to say of an error beside its text: where it was raised, unless a note on it tells that already, and its notes."""
    notes = [str(note).strip() for note in getattr(error, "__notes__", [])]
    place = "" if any(note.startswith(BEGINNING) for note in notes) else raised_from(error, whose).strip()
    return [sentence.removesuffix(".") for sentence in (place, *notes) if sentence]


def say_origin(error: BaseException, who: str, whose: Callable[..., object] | type | None = None) -> None:
    """Add to the message of an error of marl, raised while `who` was called, whose call and which line that was.

    Nothing where no frame is a stranger's: then marl knew what it was asked for. Said once, however many calls it passes.
    """
    message = str(error)
    places = origin_and_notes(error, whose)
    if BEGINNING in message or not places or not (error.args and isinstance(error.args[0], str)):
        return
    error.args = (f"{message.rstrip()} (In {who}. {'. '.join(places)}.)", *error.args[1:])


def in_brief(error: BaseException) -> str:
    """An exception in a clause: its repr, but of code that Python can't read the place and what is wrong there."""
    if not isinstance(error, SyntaxError) or error.lineno is None:
        return repr(error)
    return f"{type(error).__name__}: {_short(str(error.filename))}, line {error.lineno}: {error.msg}"


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    return traceback.walk_tb(error.__traceback__)


def _package(module: str) -> str:
    return module.partition(".")[0]


def _is_own(frame: FrameType, own: str) -> bool:
    module, file = str(frame.f_globals.get("__name__", "")), frame.f_code.co_filename
    if file.startswith("<") and not (module == MAIN and not file.startswith("<frozen")):
        return False
    return _package(module) == own or not _is_library(module, file)


def _is_library(module: str, file: str) -> bool:
    """Whether code is Python's, an installed package's, or marl's."""
    path = Path(file)
    return (
        _package(module) in OURS
        or not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
        or any(path.is_relative_to(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))
    )


def _short(file: str) -> str:
    """A path as one would write it here; the cells of a notebook have none that says anything."""
    path = Path(file)
    if file.startswith("<ipython-input") or any(part.startswith("ipykernel_") for part in path.parts):
        return "a cell of the notebook"
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file
