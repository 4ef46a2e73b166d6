"""Functions as options of a strategy: what a config calls one, where its source is, and the type of such an option."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeGuard

from pydantic import Field, PlainSerializer, PlainValidator

from marl_core.registry.strategy import Strategy

MAIN = "__main__"
"""The module of the program that is running: a script, or a notebook."""
TARGET_PATTERN = r".+:[^\W\d]\w*(\.[^\W\d]\w*)*$"
"""How a config names a function: `package.module:function`, `file.py:function`, `module:Class.method`."""
_OBJECT_ALONE = re.compile(r".+:.*(<|\(\))|functools\.partial\(", re.DOTALL)
"""What `callable_name` writes of a function that no name leads back to."""


def is_function(value: object) -> bool:
    """Whether it can be called, and is no strategy or class of strategies."""
    return callable(value) and not isinstance(value, Strategy) and not is_strategy_class(value)


def is_strategy_class(value: object) -> TypeGuard[type[Strategy]]:
    """Whether it is a class where an instance is meant."""
    return isinstance(value, type) and issubclass(value, Strategy)


def callable_name(function: str | Callable[..., Any]) -> str:
    """`module:qualname`, as a config writes a function; a text, which names one already, stays.

    An instance is `module:Class()`, its method `module:Class().method`, a partial `functools.partial(module:function)`: those, lambdas and
    functions inside of functions can't be found again by their names. The module of the running program is `__main__`.
    """
    if isinstance(function, str):
        return function
    if isinstance(function, functools.partial):
        return f"functools.partial({callable_name(function.func)})"
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, types.ModuleType):
        kind = owner if isinstance(owner, type) else type(owner)
        name = f"{kind.__qualname__}{'' if kind is owner else '()'}.{getattr(function, '__name__', '')}"
        return f"{_module(kind)}:{name}"
    if isinstance(getattr(function, "__qualname__", None), str):
        return f"{_module(function)}:{function.__qualname__}"
    return f"{_module(type(function))}:{type(function).__qualname__}()"


def short_name(function: Callable[..., Any]) -> str | None:
    """The function's own name, or its class's, for metrics; None for one without, such as a lambda."""
    if isinstance(function, functools.partial):
        return short_name(function.func)
    name = getattr(function, "__name__", None) or type(function).__name__
    return name if name.isidentifier() else None


def running_function(name: str) -> Callable[..., Any] | None:
    """What the running program calls `function` or `Class.method`; None when it has no such thing."""
    found: Any = sys.modules.get(MAIN)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if is_function(found) else None


def without_callables(value: Any) -> Any:
    """`value` with the name of each function inside plain dicts, lists and tuples in its place."""
    if isinstance(value, Mapping):
        return {key: without_callables(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        plain = [without_callables(inner) for inner in value]
        return plain if isinstance(value, list) else tuple(plain)
    return callable_name(value) if is_function(value) else value


def is_of_a_program(key: str, value: object) -> bool:
    """Whether a config's `value` at a dotted key names what only the Python program has that wrote it: an object, or a function of its own.

    A strategy that was an object is written as its class (`use: module:Class`).
    """
    text, last = str(value), key.rpartition(".")[2]
    if last == "use":
        return ":" in text
    return text.startswith(f"{MAIN}:") or (last == "target" and _OBJECT_ALONE.match(text) is not None)


def definition_of(function: Callable[..., Any]) -> Any:
    """The function or class that stands in a source file: behind decorators, partials, methods and instances."""
    inner: Any = inspect.unwrap(function)
    while isinstance(inner, functools.partial):
        inner = inspect.unwrap(inner.func)
    inner = getattr(inner, "__func__", inner)
    named = isinstance(inner, type) or isinstance(getattr(inner, "__qualname__", None), str)
    return inner if named else type(inner)


def callable_source(function: Callable[..., Any]) -> Path | str | None:
    """What a function's answers come from, as far as it is known: its file; of the running program, which people edit between two
    starts, the function's own lines. None where neither is known.
    """
    definition = definition_of(function)
    try:
        if _module(definition) == MAIN:
            return None if definition.__name__ == "<lambda>" else inspect.getsource(definition)
        file = inspect.getsourcefile(definition)
    except (OSError, TypeError):  # built in, or typed in
        return None
    return Path(file) if file is not None and Path(file).is_file() else None


def _module(named: Any) -> str:
    """Its module; that of a spawned process is its parent's running program."""
    module = str(getattr(named, "__module__", None) or type(named).__module__)
    return MAIN if module == "__mp_main__" else module


def _read(value: Any) -> str | Callable[..., Any]:
    if isinstance(value, str):
        if re.fullmatch(TARGET_PATTERN, value, re.DOTALL):
            return value
        if _OBJECT_ALONE.match(value):
            raise ValueError(
                f"{value} was an object in a Python program (an instance, a lambda, a function inside of another), which its name doesn't "
                "lead back to. Start from that program, which has the object; or move it into a file as a function with a name"
            )
        raise ValueError(f"should be `package.module:function` or `file.py:function`, but {value!r:.60} was given")
    if is_strategy_class(value) or isinstance(value, Strategy):
        kind = value if isinstance(value, type) else type(value)
        raise ValueError(
            f"{kind.__name__} is a strategy, not a function; it stands in the place of the strategy that calls one"
        )
    if not callable(value):
        raise ValueError(f"should be a function, or its name as `file.py:function`, but {value!r:.60} was given")
    function: Callable[..., Any] = value
    return function


FunctionTarget: TypeAlias = Annotated[
    str | Callable[..., Any],
    PlainValidator(_read, json_schema_input_type=Annotated[str, Field(pattern=TARGET_PATTERN)]),
    PlainSerializer(callable_name, return_type=str, when_used="json"),
]
"""Type of an option that names a function, `package.module:function` or `file.py:function`, and takes the function itself in Python."""
