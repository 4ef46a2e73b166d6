"""The policy merged into copies of the weights it adapts: one product at each token instead of those of the adapter.

The base's own weights are never touched. The copies cost memory, so they are made only where sampling through them is
the same distribution to rounding (a float32 base), and within a budget of bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from marl_core.bank.speed.folding import Folded, agrees, fold, foldable_layers, is_plain_lora
from marl_core.config.speed_config import DEAR_COPIES_SHARE, MERGED_COPIES_SHARE
from marl_core.logs import RUN, logger

if TYPE_CHECKING:
    from marl_core.bank.adapters import AdapterBank

_said: set[tuple[str, tuple[int, ...]]] = set()


@contextmanager
def merged_copies(bank: AdapterBank, adapter: str | None, *, dear_only: bool = False) -> Iterator[bool]:
    """Inside the block the layers that `adapter` adapts compute with merged copies of their weights; whether any does.

    To be used with the adapter active: a layer that can't be merged goes on as before. Inference only. `dear_only`: a LoRA's layers go on
    as before, too; its own two products cost little.
    """
    layers = _within_budget(bank, dear_only) if adapter is not None else []
    before = [(layer, vars(layer).get("forward")) for layer in layers]
    try:
        folded = _folded(layers)
        for layer, weights in folded:
            layer.forward = _linear(*weights)
        yield bool(folded)
    finally:
        for layer, forward in before:
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward


def _within_budget(bank: AdapterBank, dear_only: bool) -> list[Any]:
    """The layers whose copies fit into the budget: of a LoRA all or none, of other kinds the smallest first.

    At each token a layer costs its adapter's calls, whatever its size, so the smallest save most for their bytes. Some of a LoRA's layers
    wouldn't be worth a merge.
    """
    layers = foldable_layers(bank.base)
    base = sum(parameter.nbytes for parameter in bank.base.parameters())
    plain = [] if dear_only else [layer for layer in layers if is_plain_lora(layer)]
    chosen = plain if sum(map(_bytes, plain)) <= MERGED_COPIES_SHARE * base else []
    budget = DEAR_COPIES_SHARE * base
    for layer in sorted((layer for layer in layers if not is_plain_lora(layer)), key=_bytes):
        budget -= _bytes(layer)
        if budget < 0:
            break
        chosen.append(layer)
    return chosen


def _bytes(layer: Any) -> int:
    return int(layer.base_layer.weight.nbytes)


def _folded(layers: list[Any]) -> list[tuple[Any, Folded]]:
    """Layers with their copies; those left out whose kind PEFT can't merge, or merges into something else than it computes.

    One layer of each shape is tried, anew each time: a fresh adapter adds nothing, and any rule would look right.
    """
    found, trusted = [], dict[tuple[str, tuple[int, ...]], bool]()
    for layer in layers:
        shape = f"{type(layer).__module__}.{type(layer).__qualname__}", tuple(layer.base_layer.weight.shape)
        if trusted.get(shape) is False:
            continue
        folded = fold(layer)
        if shape not in trusted:
            trusted[shape] = folded is not None and (is_plain_lora(layer) or agrees(layer, folded))
            if not trusted[shape]:
                _say_once(shape, folded)
        if folded is not None and trusted[shape]:
            found.append((layer, folded))
    return found


def _say_once(shape: tuple[str, tuple[int, ...]], folded: Folded | None) -> None:
    if shape not in _said:
        _said.add(shape)
        why = "PEFT can't merge it" if folded is None else "merged it computes something else"
        logger(RUN).info("sampling: layers %s of %s go on unfolded: %s", shape[0], list(shape[1]), why)


def _linear(weight: Tensor, bias: Tensor | None) -> Any:
    def forward(x: Tensor, *args: Any, **options: Any) -> Tensor:
        return nn.functional.linear(x, weight, bias)

    return forward
