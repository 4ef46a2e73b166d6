"""The policy merged into copies of the weights it adapts: W + s B A, one product instead of three at each token.

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

from marl_core.config.speed_config import MERGED_COPIES_SHARE

if TYPE_CHECKING:
    from marl_core.bank.adapters import AdapterBank


@contextmanager
def merged_copies(bank: AdapterBank, adapter: str | None) -> Iterator[bool]:
    """Inside the block the layers that `adapter` adapts compute with merged copies of their weights; whether any does.

    To be used with the adapter active: a layer that can't be merged goes on as before. Inference only.
    """
    layers = mergeable_layers(bank, adapter)
    if not layers or adapter is None or _weight_bytes(layers) > MERGED_COPIES_SHARE * _base_bytes(bank):
        yield False
        return
    before = [vars(layer).get("forward") for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                merged = layer.base_layer.weight + layer.get_delta_weight(adapter)
                layer.forward = _linear(merged, layer.base_layer.bias)
        yield True
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward


def mergeable_layers(bank: AdapterBank, adapter: str | None) -> list[Any]:
    """The plain float32 LoRA layers of `adapter`: without DoRA and other variants, without a bias of their own."""
    if adapter is None:
        return []
    layers = [module for module in bank.base.modules() if isinstance(module, LoraLinear)]
    return [layer for layer in layers if adapter in layer.lora_A and _is_plain(layer, adapter)]


def _is_plain(layer: Any, adapter: str) -> bool:
    base = layer.base_layer
    return (
        adapter not in layer.lora_variant
        and layer.lora_B[adapter].bias is None
        and type(base) is nn.Linear
        and type(base.weight) is nn.Parameter  # a packed weight (torchao's) says float32 too, and can't be added to
        and base.weight.dtype == torch.float32
    )


def _linear(weight: Tensor, bias: Tensor | None) -> Any:
    def forward(x: Tensor, *args: Any, **options: Any) -> Tensor:
        return nn.functional.linear(x, weight, bias)

    return forward


def _weight_bytes(layers: list[Any]) -> int:
    return sum(layer.base_layer.weight.nbytes for layer in layers)


def _base_bytes(bank: AdapterBank) -> int:
    return sum(parameter.nbytes for parameter in bank.base.parameters())
