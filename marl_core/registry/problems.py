"""A pydantic ValidationError as a person reads it: a line per problem with path, value, what is allowed, near match."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from marl_core.errors import InvalidConfig, near_match
from marl_core.registry.model_keys import KeyPath, dotted, keys_of


def problem_lines(
    error: ValidationError,
    written: Mapping[str, Any],
    suggest: Callable[[KeyPath], str],
    prefix: KeyPath = (),
) -> dict[KeyPath, str]:
    """Each problem's path in `written` and its line.

    `prefix` is the path of the part that was validated; `suggest` gives the sentence that follows an unknown key, by its path.
    """
    errors_by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        errors_by_path.setdefault(_path_in((*prefix, *details["loc"]), details["type"], written), []).append(details)
    return {path: _line(path, details, suggest) for path, details in errors_by_path.items()}


def told(source: str, lines: Iterable[str], where: str = "") -> str:
    """The message of `source` (a file, a class) with its problems below it, a line each."""
    indented = [f"  {line}" for line in lines]
    return "\n".join([f"{source}: {len(indented)} problem{'s' if len(indented) > 1 else ''}{where}:", *indented])


def suggestion(key: str, known: Collection[str], belongs_in: Iterable[str] = ()) -> str:
    """What to do about an unknown key: the near one, the sections that have it, or what there is."""
    near = near_match(key, known)
    if near is not None:
        return f"Did you mean {near!r}?"
    sections = list(belongs_in)
    if sections:
        return f"It belongs in {' or '.join(sections)}."
    return f"Known here: {', '.join(sorted(known))}." if known else "Remove it."


class PlainlyTold(BaseModel):
    """A model whose constructor tells mistakes as a config file's are told: by a ConfigError with a line for each, not by pydantic's error.

    That error is the cause (`__cause__`). pydantic's own ways in (`model_validate`, a model inside of another) raise pydantic's.
    """

    if not TYPE_CHECKING:  # type checkers know the fields

        def __init__(self, /, **given: Any) -> None:
            """As BaseModel's, which has just this line: deprecations are blamed on the caller by counting frames."""
            try:
                self.__pydantic_validator__.validate_python(given, self_instance=self)
            except ValidationError as error:
                raise InvalidConfig(self._told(error, given)) from error

        # pydantic's mark of an __init__ that only validates: without it a model inside another would be made by this call,
        # and its problems would be no problems of the whole
        __init__.__pydantic_base_init__ = True

    @classmethod
    def _told(cls, error: ValidationError, given: Mapping[str, Any]) -> str:
        """The message of wrong values `given` to the constructor."""
        lines = problem_lines(error, given, lambda path: suggestion(str(path[-1]), keys_of(cls)))
        return told(cls.__name__, lines.values())


def _path_in(location: KeyPath, kind: str, written: Mapping[str, Any]) -> KeyPath:
    """pydantic's `location` without its tags for members of a union, which are no keys of what was written."""
    path: list[str | int] = []
    value: Any = written
    for index, part in enumerate(location):
        is_missing = kind == "missing" and index == len(location) - 1
        if isinstance(value, Mapping) and isinstance(part, str):
            if part in value:
                value = value[part]
            elif index and not is_missing:
                continue
            else:
                value = None
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif not is_missing:
            continue
        path.append(part)
    return tuple(path)


def _line(path: KeyPath, errors: list[ErrorDetails], suggest: Callable[[KeyPath], str]) -> str:
    first = errors[0]
    dotted_path = dotted(path) or "config"
    if first["type"] == "extra_forbidden":
        return f"{dotted_path}: unknown key. {suggest(path)}"
    if first["type"] == "missing":
        return f"{dotted_path}: is required and wasn't given."
    if first["type"] == "value_error":
        return f"{dotted_path}: {first['msg'].removeprefix('Value error, ').rstrip('.')}."
    expectation = _expectation(" or ".join(dict.fromkeys(details["msg"] for details in errors)))
    return f"{dotted_path}: {expectation}, but {_shortened(first['input'])} was given."


def _expectation(message: str) -> str:
    text = message.replace("Input should", "should")
    text = re.sub(r"a valid dictionary or instance of \w+", "a section (a mapping with keys)", text)
    text = re.sub(r" or should be an instance of Strategy", "", text)
    return text[:1].lower() + text[1:]


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
