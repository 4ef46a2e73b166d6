"""Options that don't fit the layers: sizes that PEFT can't make there, and patterns for layers that match none of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any, TypeAlias

from marl_core import near_match
from marl_plugins.adapter.layers import Layers, by_pattern, chosen_layers, stands_for

Options: TypeAlias = Mapping[str, Any]
Wrong: TypeAlias = tuple[str, str]
"""PEFT's name of an option, and what is wrong with it."""
OfLayer: TypeAlias = Callable[[Options, str, int, int], Iterable["Demand"]]
"""Of PEFT's options, a layer's name, and how many outputs and inputs it has."""
MOST_SHOWN = 8
"""How many sizes that would do a message names at most."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a layer demands of a number: that it divides `bound`, or, where there is a `why`, that it isn't above it."""

    option: str
    """PEFT's name."""
    number: int
    bound: int
    why: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the number fits the layer."""
        return self.number <= self.bound if self.why else self.number > 0 and self.bound % self.number == 0


def misfits(kind: str, options: Options, layers: Layers, weights: Iterable[str] = ()) -> Iterator[Wrong]:
    """Numbers that a layer can't be adapted with, and patterns that name none of the layers or of the `weights` adapted beside them."""
    if not layers:  # nothing is known of the model
        return
    yield from _lost_patterns(options, [*layers, *weights])
    of_layer = OF_LAYER.get(kind)
    if of_layer is None:
        return
    demands: dict[str, list[tuple[Demand, str]]] = {}
    for name, (rows, columns) in chosen_layers(layers, options).items():
        for demand in of_layer(options, name, rows, columns):
            demands.setdefault(demand.option, []).append((demand, name))
    for option, made in demands.items():
        unmet = [(demand, name) for demand, name in made if not demand.is_met]
        if unmet:
            demand, name = min(unmet, key=lambda pair: pair[0].bound)
            rows, columns = layers[name]
            yield (
                option,
                f"{_told(demand, [other for other, _ in made])} Layer {name} has {columns} inputs and {rows} outputs.",
            )


def _told(demand: Demand, all_of_them: Iterable[Demand]) -> str:
    if demand.why:
        return f"{demand.number} is more than {demand.bound}, {demand.why}."
    common = gcd(*(other.bound for other in all_of_them))
    fit = [str(number) for number in range(1, common + 1) if common % number == 0]
    some = fit if len(fit) <= MOST_SHOWN else ["...", *fit[-MOST_SHOWN:]]
    return f"{demand.number} doesn't divide the sides of all layers: {', '.join(some)} would do."


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


def _divides(option: str, size: int, *sides: int) -> Demand:
    """A size must divide all these sides of a layer."""
    return Demand(option, size, gcd(*sides))


def _miss(options: Options, name: str, rows: int, columns: int) -> Iterator[Demand]:
    rank, form = _number(options, "r", 64), options.get("init_weights")
    yield _divides("r", rank, columns, rows) if form == "bat" else Demand("r", rank, columns, "the layer's inputs")
    if form == "mini":
        yield _divides("mini_r", _number(options, "mini_r", 1), rows)


def _lora(options: Options, name: str, rows: int, columns: int) -> Iterator[Demand]:
    if options.get("init_lora_weights") == "mica":
        option, rank = _by_layer(options, name, "r", 8, "rank_pattern")
        yield Demand(option, rank, min(rows, columns), "the layer's smaller side, and MiCA takes r of its directions")


def _by_layer(options: Options, name: str, option: str, default: int, pattern: str) -> tuple[str, int]:
    """A layer's number, and the option that it comes from."""
    usual = _number(options, option, default)
    number = by_pattern(options.get(pattern) or {}, name, usual)
    return option if number == usual else pattern, number


def _boft(options: Options, name: str, rows: int, columns: int) -> Iterator[Demand]:
    size, blocks = _number(options, "boft_block_size", 4), _number(options, "boft_block_num", 0)
    yield _divides("boft_block_size", size, columns) if size else _divides("boft_block_num", blocks, columns)


def _c3a(options: Options, name: str, rows: int, columns: int) -> Iterator[Demand]:
    yield _divides(*_by_layer(options, name, "block_size", 256, "block_size_pattern"), columns, rows)


def _frequencies(default: int) -> OfLayer:
    def demands(options: Options, name: str, rows: int, columns: int) -> Iterator[Demand]:
        if not options.get("proportional_parameters"):
            option, count = _by_layer(options, name, "n_frequency", default, "n_frequency_pattern")
            yield Demand(option, count, rows * columns, "the numbers of the layer's weight")

    return demands


def _rank_within(default: int, bound: Callable[[int, int], int], why: str) -> OfLayer:
    return lambda options, name, rows, columns: [Demand("r", _number(options, "r", default), bound(rows, columns), why)]


SMALLER = "the layer's smaller side"
OF_LAYER: Mapping[str, OfLayer] = {
    "lora": _lora,
    "miss": _miss,
    "boft": _boft,
    "c3a": _c3a,
    "gralora": lambda options, name, rows, columns: [
        _divides("gralora_k", _number(options, "gralora_k", 2), columns, rows)
    ],
    "road": lambda options, name, rows, columns: [_divides("group_size", _number(options, "group_size", 64), rows)],
    "fourierft": _frequencies(1000),
    "waveft": _frequencies(2592),
    "shira": _rank_within(
        32, lambda rows, columns: rows * columns // (rows + columns), "where r (in + out) is all of the layer's weight"
    ),
    "psoft": _rank_within(32, min, SMALLER),
    "randlora": _rank_within(32, min, SMALLER),
    "deft": _rank_within(8, min, SMALLER),
    "hra": _rank_within(
        8, lambda rows, columns: columns, "the layer's inputs: that many reflections make any rotation"
    ),
}
"""What each layer demands."""
