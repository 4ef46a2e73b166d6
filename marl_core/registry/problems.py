"""A pydantic ValidationError as a person reads it: a line per problem with path, value, what is allowed, near match."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from marl_core.errors import InvalidConfig, near_match
from marl_core.registry.model_keys import KeyPath, dotted, keys_of

SHOWN = 60
"""Most characters of a value that a message shows."""
EXACT_FLOATS = 2.0**53
"""Below it a float is exactly the whole number that it seems to be."""
TRUE_WORDS, FALSE_WORDS = ("yes", "on", "y", "1", "true"), ("no", "off", "n", "0", "false")
"""What YAML 1.1, and people, write for true and for false."""


def problem_lines(
    error: ValidationError,
    written: Mapping[str, Any],
    suggest: Callable[[KeyPath], str],
    prefix: KeyPath = (),
    required: Callable[[KeyPath], str] = lambda path: "",
) -> dict[KeyPath, str]:
    """Each problem's path in `written` and its line.

    `prefix` is the path of the part that was validated; `suggest` gives the sentence that follows an unknown key, by its path, and
    `required` the one that follows a missing key.
    """
    errors_by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        errors_by_path.setdefault(_path_in((*prefix, *details["loc"]), details["type"], written), []).append(details)
    return {path: _line(path, details, suggest, required) for path, details in errors_by_path.items()}


def told(source: str, lines: Iterable[str], where: str = "") -> str:
    """The message of `source` (a file, a class) with its problems below it, a line each."""
    indented = [f"  {line}" for line in lines]
    return "\n".join([f"{source}: {len(indented)} problem{'s' if len(indented) > 1 else ''}{where}:", *indented])


def suggestion(key: str, known: Collection[str], belongs_in: Iterable[str] = (), nested: Iterable[str] = ()) -> str:
    """What to do about an unknown key: the near one, the sections that have it, or what there is.

    `nested` are keys of inner sections (`kl.coef`), which count as near ones unless a section has the key itself.
    """
    sections = list(belongs_in)
    near = near_match(key, known if sections else [*nested, *known])
    if near is not None:
        return f"Did you mean {near!r}?"
    if sections:
        return f"It belongs in {' or '.join(sections)}."
    return f"Known here: {', '.join(sorted(known))}." if known else "Remove it."


class PlainlyTold(BaseModel):
    """A model whose constructor tells mistakes as a config file's are told: by a ConfigError with a line for each, not by pydantic's error.

    That error is the cause (`__cause__`). pydantic's own ways in (`model_validate`, a model inside of another) raise pydantic's.
    """

    if not TYPE_CHECKING:  # type checkers know the fields

        def __init__(self, /, *unnamed: Any, **given: Any) -> None:
            """As BaseModel's, which has just this line: deprecations are blamed on the caller by counting frames."""
            if unnamed:
                raise InvalidConfig(self._told_unnamed(unnamed))
            try:
                self.__pydantic_validator__.validate_python(given, self_instance=self)
            except ValidationError as error:
                raise InvalidConfig(self._told(error, given)) from error

        # pydantic's mark of an __init__ that only validates: without it a model inside another would be made by this call,
        # and its problems would be no problems of the whole
        __init__.__pydantic_base_init__ = True

        def __setattr__(self, name: str, value: Any) -> None:
            """As BaseModel's, with words of our own for what can't be set."""
            try:
                super().__setattr__(name, value)
            except ValidationError as error:
                raise InvalidConfig(self._told_fixed(name, value)) from error

        def __delattr__(self, name: str) -> None:
            """As BaseModel's, with words of our own for what can't be taken away."""
            try:
                super().__delattr__(name)
            except ValidationError as error:
                raise InvalidConfig(self._told_fixed(name, None)) from error

    @classmethod
    def _told_unnamed(cls, unnamed: tuple[Any, ...]) -> str:
        """The message of values given to the constructor without a name."""
        what = "**mapping" if isinstance(unnamed[0], Mapping) else "key=value"
        return f"{cls.__name__}: give keys by name: {cls.__name__}({what})."

    @classmethod
    def _told_fixed(cls, name: str, value: Any) -> str:
        """The message of an attribute that was to be set (value None: or deleted)."""
        return f"{cls.__name__}: {name} can't be changed once it is made; make a new {cls.__name__}."

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


def _line(
    path: KeyPath,
    errors: list[ErrorDetails],
    suggest: Callable[[KeyPath], str],
    required: Callable[[KeyPath], str],
) -> str:
    first = errors[0]
    dotted_path = dotted(path) or "config"
    if first["type"] == "extra_forbidden":
        return f"{dotted_path}: unknown key. {suggest(path)}"
    if first["type"] == "missing":
        return f"{dotted_path}: is required and wasn't given. {required(path)}".rstrip()
    if first["type"] == "value_error":
        said = first["msg"].removeprefix("Value error, ").rstrip(".")
        return f"{dotted_path}: {said}{'' if said.endswith('?') else '.'}"
    expectation = _expectation(" or ".join(dict.fromkeys(details["msg"] for details in errors)))
    meant = next((meant for details in errors if (meant := _meant(details["type"], details["input"]))), None)
    instead = f" Write {meant}." if meant else ""
    return f"{dotted_path}: {expectation}, but {_shortened(first['input'])} was given.{instead}"


def _meant(kind: str, value: Any) -> str | None:
    """What somebody may have meant by a value of another type, as it is to be written; None where that can't be guessed."""
    if kind == "list_type" and isinstance(value, str | int | float):
        return f"[{value}]" if len(str(value)) <= SHOWN else "[...]"
    if kind == "bool_type":
        return {**dict.fromkeys(TRUE_WORDS, "true"), **dict.fromkeys(FALSE_WORDS, "false")}.get(str(value).lower())
    if kind in ("int_type", "int_from_float"):
        return _whole_number(value)
    if kind == "float_type" and isinstance(value, str):
        with suppress(ValueError):
            return f"{float(value):g}" if math.isfinite(float(value)) else None
    return None


def _whole_number(value: Any) -> str | None:
    """The whole number that a text or another number is, as digits."""
    try:
        number = float(value) if isinstance(value, str | float) else None
    except ValueError:
        return None
    return f"{int(number)}" if number is not None and number.is_integer() and abs(number) < EXACT_FLOATS else None


def _expectation(message: str) -> str:
    text = message.replace("Input should", "should")
    text = re.sub(r"a valid dictionary or instance of \w+", "a section (a mapping with keys)", text)
    text = re.sub(r" or should be an instance of Strategy", "", text)
    return text[:1].lower() + text[1:]


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
