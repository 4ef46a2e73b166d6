"""Which layers an adapter stands on, as PEFT chooses them among those that the targets match."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

Layers: TypeAlias = Mapping[str, tuple[int, int]]
"""Linear layers by full name: (out, in)."""


def chosen_layers(layers: Layers, options: Mapping[str, Any]) -> Layers:
    """`layers` without those that PEFT's options `exclude_modules`, `layers_to_transform` and `layers_pattern` leave out."""
    excluded, numbers = options.get("exclude_modules"), options.get("layers_to_transform")
    wanted = {numbers} if isinstance(numbers, int) else set(numbers or ())
    patterns = options.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return {
        name: shape
        for name, shape in layers.items()
        if not _named(name, excluded) and (numbers is None or _number(name, patterns) in wanted)
    }


def by_pattern(patterns: Mapping[str, int], name: str, default: int) -> int:
    """The number of the first pattern that a layer's name ends with, as PEFT looks it up (`rank_pattern`)."""
    found = next((key for key in patterns if stands_for(key, name)), None)
    return default if found is None else patterns[found]


def stands_for(pattern: str, name: str) -> bool:
    """Whether a pattern is the end of a layer's name or an expression for it, as PEFT looks it up. re.error when it is no expression."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _named(name: str, excluded: str | Iterable[str] | None) -> bool:
    if not excluded:
        return False
    if isinstance(excluded, str):
        return re.fullmatch(excluded, name) is not None
    return any(name == key or name.endswith(f".{key}") for key in excluded)


def _number(name: str, patterns: Iterable[str]) -> int | None:
    """The layer's number in the model, e.g. 3 of `model.layers.3.mlp.up_proj`."""
    for pattern in patterns:
        match = re.match(rf".*\.{pattern}\.(\d+)\.", name)
        if match is not None:
            return int(match[1])
    return None
