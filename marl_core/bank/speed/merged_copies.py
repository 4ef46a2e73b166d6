"""The policy folded into copies of the weights it adapts: W + s B A, one product instead of three at each token.

The base's own weights are never touched. The copies cost memory, so they are made only where sampling through them is
the same distribution to rounding (a float32 base) and they stay small beside the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

if TYPE_CHECKING:
    from marl_core.bank.adapters import AdapterBank

SHARE = 0.25  # of the base's bytes that folded copies may take


@contextmanager
def folded(bank: AdapterBank, adapter: str | None) -> Iterator[bool]:
    """Inside the block the layers that `adapter` adapts compute with folded copies; whether any does.

    To be used with the adapter active: a layer that can't be folded goes on as before. Inference only.
    """
    layers = foldable(bank, adapter)
    if not layers or adapter is None or _bytes(layers) > SHARE * _base_bytes(bank):
        yield False
        return
    before = [vars(layer).get("forward") for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.forward = _product(
                    layer.base_layer.weight + layer.get_delta_weight(adapter), layer.base_layer.bias
                )
        yield True
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward


def foldable(bank: AdapterBank, adapter: str | None) -> list[Any]:
    """The plain float32 LoRA layers of `adapter`: without DoRA and other variants, without a bias of their own."""
    if adapter is None:
        return []
    found = [module for module in bank.base.modules() if isinstance(module, LoraLinear)]
    return [layer for layer in found if adapter in layer.lora_A and _plain(layer, adapter)]


def _plain(layer: Any, adapter: str) -> bool:
    base = layer.base_layer
    return (
        adapter not in layer.lora_variant
        and layer.lora_B[adapter].bias is None
        and type(base) is nn.Linear
        and type(base.weight) is nn.Parameter  # a packed weight (torchao's) says float32 too, and can't be added to
        and base.weight.dtype == torch.float32
    )


def _product(weight: Tensor, bias: Tensor | None) -> Any:
    def forward(x: Tensor, *args: Any, **options: Any) -> Tensor:
        return nn.functional.linear(x, weight, bias)

    return forward


def _bytes(layers: list[Any]) -> int:
    return sum(layer.base_layer.weight.nbytes for layer in layers)


def _base_bytes(bank: AdapterBank) -> int:
    return sum(parameter.nbytes for parameter in bank.base.parameters())
