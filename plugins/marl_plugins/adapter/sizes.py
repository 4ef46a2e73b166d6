"""Options that don't fit the layers: sizes that PEFT can't make there, and patterns for layers that match none of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from marl_core import near_match
from marl_plugins.adapter.layers import Layers, by_pattern, chosen_layers, stands_for

Options: TypeAlias = Mapping[str, Any]
Wrong: TypeAlias = tuple[str, str]
"""PEFT's name of an option, and what is wrong with it."""
OfLayer: TypeAlias = Callable[[Options, str, int, int], Iterable[Wrong]]
"""Of PEFT's options, a layer's name, and how many outputs and inputs it has."""
MOST_SHOWN = 8
"""How many sizes that would do a message names at most."""


def misfits(kind: str, options: Options, layers: Layers, weights: Iterable[str] = ()) -> Iterator[Wrong]:
    """The first layer that each option doesn't fit, and patterns that name none of the layers or of the `weights` adapted beside them."""
    if not layers:  # nothing is known of the model
        return
    yield from _lost_patterns(options, [*layers, *weights])
    check = OF_LAYER.get(kind)
    told: set[str] = set()
    for name, (rows, columns) in chosen_layers(layers, options).items() if check else ():
        for option, what in check(options, name, rows, columns) if check else ():
            if option not in told:
                told.add(option)
                yield option, f"{what} Layer {name} has {columns} inputs and {rows} outputs."


def lost(option: str, names: Iterable[str], layers: Iterable[str]) -> Iterator[Wrong]:
    """Names of layers among which some match none of them."""
    known = list(layers)
    ends = sorted({name.rpartition(".")[2] for name in known})
    for name in names:
        try:
            if any(stands_for(name, layer) for layer in known):
                continue
        except re.error:
            yield option, f"{name!r} is neither the end of a layer's name nor a regular expression."
            continue
        near = near_match(name, ends)
        way_out = f"Did you mean {near!r}? " if near else ""
        yield option, f"{name!r} matches none of the adapted layers. {way_out}They are: {', '.join(ends)}."


def lost_ends(option: str, names: Iterable[str], layers: Iterable[str]) -> Iterator[Wrong]:
    """As `lost`, of names that are ends of names, and no expressions."""
    return lost(option, map(re.escape, names), layers)


def _lost_patterns(options: Options, layers: list[str]) -> Iterator[Wrong]:
    for option, patterns in options.items():
        if option.endswith("_pattern") and isinstance(patterns, Mapping):
            yield from lost(option, map(str, patterns), layers)


def _number(options: Options, name: str, default: int) -> int:
    value: int = options.get(name, default)
    return value


def _divides(option: str, size: int, *sides: int) -> Iterator[Wrong]:
    """A size that must divide all these sides of a layer."""
    if size < 1 or any(side % size for side in sides):
        fit = [number for number in range(1, min(sides) + 1) if not any(side % number for side in sides)]
        some = fit if len(fit) <= MOST_SHOWN else ["...", *fit[-MOST_SHOWN:]]
        yield option, f"{size} must divide {' and '.join(map(str, sides))}: {', '.join(map(str, some))} would do."


def _at_most(option: str, number: int, bound: int, why: str) -> Iterator[Wrong]:
    if number > bound:
        yield option, f"{number} is more than {bound}, {why}."


def _miss(options: Options, name: str, rows: int, columns: int) -> Iterator[Wrong]:
    rank, form = _number(options, "r", 64), options.get("init_weights")
    if form == "bat":
        yield from _divides("r", rank, columns, rows)
    else:
        yield from _at_most("r", rank, columns, "the inputs of the layer")
    if form == "mini":
        yield from _divides("mini_r", _number(options, "mini_r", 1), rows)


def _lora(options: Options, name: str, rows: int, columns: int) -> Iterator[Wrong]:
    if options.get("init_lora_weights") == "mica":
        patterns = options.get("rank_pattern") or {}
        rank = by_pattern(patterns, name, _number(options, "r", 8))
        option = "r" if rank == _number(options, "r", 8) else "rank_pattern"
        yield from _at_most(
            option, rank, min(rows, columns), "the layer's smaller side, and MiCA takes r of its directions"
        )


def _boft(options: Options, name: str, rows: int, columns: int) -> Iterator[Wrong]:
    size, blocks = _number(options, "boft_block_size", 4), _number(options, "boft_block_num", 0)
    if bool(size) == bool(blocks):
        yield "boft_block_num", f"{blocks} beside boft_block_size {size}: give one of the two, and 0 for the other."
    elif size:
        yield from _divides("boft_block_size", size, columns)
    else:
        yield from _divides("boft_block_num", blocks, columns)


def _c3a(options: Options, name: str, rows: int, columns: int) -> Iterator[Wrong]:
    usual = _number(options, "block_size", 256)
    size = by_pattern(options.get("block_size_pattern") or {}, name, usual)
    yield from _divides("block_size" if size == usual else "block_size_pattern", size, columns, rows)


def _frequencies(default: int) -> OfLayer:
    def check(options: Options, name: str, rows: int, columns: int) -> Iterator[Wrong]:
        usual = _number(options, "n_frequency", default)
        count = by_pattern(options.get("n_frequency_pattern") or {}, name, usual)
        option = "n_frequency" if count == usual else "n_frequency_pattern"
        yield from _at_most(option, count, rows * columns, "the numbers of the layer's weight")

    return check


def _shira(options: Options, name: str, rows: int, columns: int) -> Iterator[Wrong]:
    most = rows * columns // (rows + columns)
    yield from _at_most("r", _number(options, "r", 32), most, "where r (in + out) is all of the layer's weight")


def _within_both(default: int) -> OfLayer:
    return lambda options, name, rows, columns: _at_most(
        "r", _number(options, "r", default), min(rows, columns), "the layer's smaller side"
    )


OF_LAYER: Mapping[str, OfLayer] = {
    "lora": _lora,
    "miss": _miss,
    "boft": _boft,
    "c3a": _c3a,
    "gralora": lambda options, name, rows, columns: _divides(
        "gralora_k", _number(options, "gralora_k", 2), columns, rows
    ),
    "road": lambda options, name, rows, columns: _divides("group_size", _number(options, "group_size", 64), rows),
    "fourierft": _frequencies(1000),
    "waveft": lambda options, name, rows, columns: (
        () if options.get("proportional_parameters") else _frequencies(2592)(options, name, rows, columns)
    ),
    "shira": _shira,
    "psoft": _within_both(32),
    "randlora": _within_both(32),
    "deft": _within_both(8),
    "hra": lambda options, name, rows, columns: _at_most(
        "r", _number(options, "r", 8), columns, "the inputs of the layer: that many reflections make any rotation"
    ),
}
"""What doesn't fit one layer."""
