"""Where in the user's own code a reward function failed, and what it had been given: a note on the error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from marl_core import raised_from

STANDARD_ARGUMENTS = ("prompts", "completions", "completion_ids")
A_COMPLETION_OF_A_CHAT = "A completion is a list of one message here: its text is completion[0]['content']."


@contextmanager
def noting_origin(
    function: Callable[..., Any], arguments: Iterable[str], columns: Iterable[str] = (), *, chats: bool = False
) -> Iterator[None]:
    """Add a note to an error of `function`, called with these keyword `arguments`: where it was raised, and what was given.

    `columns`: those that the data have, given or not. `chats`: whether completions are messages, which many a function takes for texts.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        place, names = raised_from(error, function), set(arguments)
        takes_text = chats and bool(place) and "completions" in names and isinstance(error, AttributeError | TypeError)
        error.add_note(
            place + _arguments_sentence(names, set(columns)) + (f" {A_COMPLETION_OF_A_CHAT}" if takes_text else "")
        )
        raise


def _arguments_sentence(names: set[str], columns: set[str]) -> str:
    given = sorted(names - {*STANDARD_ARGUMENTS})
    standard = ", ".join(name for name in STANDARD_ARGUMENTS if name in names)
    of_data = f"the data's columns {', '.join(given)}" if given else "no columns of the data"
    others = ", ".join(sorted(columns - names))
    rest = f"; the data {'also ' if given else ''}have {others or 'none'}" if others or not given else ""
    return f"The function was given {' and '.join(filter(None, (standard, of_data)))}{rest}."
