"""Errors a user may see, each with the exit code the command line ends with.

Every message has three parts: what was asked, what is wrong and whose it is, what to do.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType


class MarlError(Exception):
    """Base of all errors marl raises on purpose. A MarlError is never a bug of marl itself."""

    exit_code = 1


class ConfigError(MarlError):
    """The config, or a combination of its choices, can't work."""

    exit_code = 2


class InvalidConfig(ConfigError, ValueError):
    """Values given to a config, a section or a strategy that it can't have. A ValueError too, as pydantic's own error is.

    So pydantic collects it with the other problems where a validator makes a section or a strategy.
    """


class PluginError(MarlError):
    """A strategy is missing, ambiguous, broken, or gave something its hook doesn't allow."""

    exit_code = 3


class DataError(MarlError):
    """A file, adapter, checkpoint or data set is missing, damaged or of the wrong kind."""

    exit_code = 4


class NumericError(MarlError):
    """A number that must be finite or equal isn't: training would go on with wrong mathematics."""

    exit_code = 5
    rows: list[int] = []  # noqa: RUF012  # replaced, never changed in place
    """Rows of the minibatch it came from; empty when it wasn't in one."""


class Stopped(MarlError):
    """Ctrl-C or SIGTERM ended the run after a whole step; `exit_code` is 128 plus the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class MarlDeprecationWarning(FutureWarning):
    """Something public will be gone in the next minor version; the message says what to use instead."""


class OutOfMemoryError(MarlError):
    """The run doesn't fit into the memory of its device; the message says in which phase, and what makes it smaller."""

    exit_code = 6


class RankError(MarlError):
    """Of several processes that make one run, one failed, hangs, or doesn't agree with the others."""

    exit_code = 5

    def __init__(self, message: str, code: int = 5) -> None:
        """`code`: what the rank that failed first ends with."""
        super().__init__(message)
        self.exit_code = code


class MarlWarning(UserWarning):
    """A run will do what was asked, and that may not be what was meant."""


class PluginWarning(MarlWarning, RuntimeWarning):
    """A package did something on import that a run can't have, and that was undone."""


RESUME = ("--resume", "Runner(config, resume=True)")
OVERRIDE = ("--override", "override=True")
MERGE = ("marl merge", "marl_core.merge_adapter")
"""Options and commands of `marl`, each with what Python has instead: for `in_words`."""

_BY_COMMAND: ContextVar[bool] = ContextVar("marl_by_command", default=False)


@contextmanager
def by_command() -> Iterator[None]:
    """A block in which a command of `marl` runs: messages name its options. Outside of one they name what Python has instead."""
    token = _BY_COMMAND.set(True)
    try:
        yield
    finally:
        _BY_COMMAND.reset(token)


def in_words(command: str, python: str) -> str:
    """The way out in the words of whoever asked: an option or command of `marl` for the command line, a call for Python."""
    return command if _BY_COMMAND.get() else python


def tell_beside(error: BaseException, sentence: str) -> None:
    """Say more with an error that is on its way: in the message of a MarlError, which is all that is shown of it; else as a note."""
    if not sentence:
        return
    if isinstance(error, MarlError):
        error.args = (f"{error} {sentence}", *error.args[1:])
    else:
        error.add_note(sentence)


def together(problems: Sequence[MarlError], heading: str) -> MarlError:
    """Several problems as one error, each on a line below `heading`: of their kind where all are of one, else a ConfigError."""
    kinds = {type(problem) for problem in problems}
    kind = kinds.pop() if len(kinds) == 1 else ConfigError
    return kind("\n".join([heading, *(f"  {problem}" for problem in problems)]))


INSIDE = ("marl_core", "marl_plugins")
THROUGH = (
    "asyncio",
    "concurrent",
    "contextlib",
    "functools",
    "importlib",
    "pluggy",
    "pydantic",
    "runpy",
    "threading",
    "torch",
)
"""What may stand between the caller and marl, or below all of it: no line of it is anybody's to change."""
_SHOWN_WITHOUT_A_LINE: dict[str | tuple[str, type[Warning], int], int] = {}
"""The registry by which Python's `warnings` shows a warning once; each module has one of its own."""


def warn(message: str, category: type[Warning] = MarlWarning) -> None:
    """Warn of the line that called marl, however deep inside of marl the reason was found.

    Where no line has, as in a thread of marl's own, the warning names `marl` instead.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _package_of(frame) in (*INSIDE, *THROUGH):
        frame = frame.f_back
    if frame is None:
        warnings.warn_explicit(message, category, "marl", 0, "marl", _SHOWN_WITHOUT_A_LINE)
        return
    code, module = frame.f_code, frame.f_globals  # as warnings.warn does, which counts frames of imports otherwise
    registry = module.setdefault("__warningregistry__", {})
    warnings.warn_explicit(
        message, category, code.co_filename, frame.f_lineno, module.get("__name__", "<string>"), registry, module
    )


def _package_of(frame: FrameType) -> str:
    """The package whose code a frame runs; of a package run by `python -m` that package, too."""
    name = str(frame.f_globals.get("__name__", ""))
    return (str(frame.f_globals.get("__package__") or name) if name == "__main__" else name).split(".")[0]


def counted(count: int, noun: str) -> str:
    """`1 prompt`, `2 prompts`, `1,000 prompts`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def near_match(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that `word` may be a slip of the pen for, for messages; None when none is near. Case, `-`, `_` and `.` count
    alike.

    `cutoff`: how alike they must be, from 0 to 1.
    """
    spelled = {_plain(name): name for name in known}
    near = difflib.get_close_matches(_plain(word), spelled, n=1, cutoff=cutoff)
    return spelled[near[0]] if near else None


def _plain(word: str) -> str:
    return word.strip().lower().replace("-", "_").replace(".", "_")
