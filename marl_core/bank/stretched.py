"""Rotary positions whose frequencies depend on how long a row is: `longrope` (Phi-3, MiniCPM) and `dynamic` (InternLM).

transformers takes them from the longest row of a pass, and `dynamic` ones from passes before it too. So rows are computed
with those that have the same frequencies, each as it is alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class _Rotary:
    """One set of frequencies of a rotary module, and the row length up to which they are the original ones."""

    module: Any
    dynamic: bool
    prefix: str
    until: int

    def kind(self, length: int) -> int:
        """Rows of one kind have the same frequencies."""
        return max(length, self.until) if self.dynamic else int(length > self.until)

    def forget(self) -> None:
        """Original frequencies, whatever was computed before."""
        if self.dynamic:
            frequencies = getattr(self.module, f"{self.prefix}inv_freq")
            original = getattr(self.module, f"{self.prefix}original_inv_freq").to(frequencies.device)
            self.module.register_buffer(f"{self.prefix}inv_freq", original.clone(), persistent=False)
            setattr(self.module, f"{self.prefix}max_seq_len_cached", self.until)


class Stretched:
    """The rotary modules of a model whose frequencies depend on the row; none in most models."""

    def __init__(self, model: nn.Module) -> None:
        self._found = [rotary for module in model.modules() for rotary in _rotary(module)]

    @property
    def until(self) -> int | None:
        """Tokens up to which a row's frequencies stay the same while it grows; None without a bound."""
        return min((rotary.until for rotary in self._found), default=None)

    def forget(self) -> None:
        """What passes before have left."""
        for rotary in self._found:
            rotary.forget()

    def alike(self, lengths: Sequence[int]) -> bool:
        """Whether rows of these lengths have the same frequencies."""
        return len({self._kind(length) for length in lengths}) <= 1

    def groups(self, lengths: Sequence[int], one_each: bool = False) -> list[list[int]]:
        """Places of the rows that can share a pass; `one_each`: as many passes as rows, whatever their lengths."""
        if not self._found:
            return [list(range(len(lengths)))]
        groups: dict[Any, list[int]] = {}
        for row, length in enumerate(lengths):
            groups.setdefault(row if one_each else self._kind(length), []).append(row)
        return list(groups.values())

    def _kind(self, length: int) -> tuple[int, ...]:
        return tuple(rotary.kind(length) for rotary in self._found)


def _rotary(module: Any) -> Iterator[_Rotary]:
    types: Any = getattr(module, "rope_type", None)
    by_layer = isinstance(types, Mapping)
    for layer, kind in types.items() if by_layer else [("", types)]:
        if not isinstance(kind, str) or not ("dynamic" in kind or kind == "longrope"):
            continue
        dynamic, prefix = "dynamic" in kind, f"{layer}_" if by_layer else ""
        named = module.config.rope_parameters[layer] if by_layer else module.config.rope_parameters
        until = module.original_max_seq_len if dynamic else named["original_max_position_embeddings"]
        yield _Rotary(module, dynamic, prefix, int(until))
