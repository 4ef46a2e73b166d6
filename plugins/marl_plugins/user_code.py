"""Where in the user's own code a reward function failed, and what it had been given: a note on the error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from marl_core import raised_from

STANDARD_ARGUMENTS = ("prompts", "completions", "completion_ids")


@contextmanager
def noting_origin(
    function: Callable[..., Any], arguments: Iterable[str], columns: Iterable[str] = ()
) -> Iterator[None]:
    """Add a note to an error of `function`, called with these keyword `arguments`: where it was raised, and what was given.

    `columns`: those that the data have, given or not.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        error.add_note(raised_from(error, function) + _arguments_sentence(set(arguments), set(columns)))
        raise


def _arguments_sentence(names: set[str], columns: set[str]) -> str:
    given = sorted(names - {*STANDARD_ARGUMENTS})
    standard = ", ".join(name for name in STANDARD_ARGUMENTS if name in names)
    of_data = f"the data's columns {', '.join(given)}" if given else "no columns of the data"
    others = ", ".join(sorted(columns - names))
    rest = f"; the data {'also ' if given else ''}have {others or 'none'}" if others or not given else ""
    return f"The function was given {' and '.join(filter(None, (standard, of_data)))}{rest}."
