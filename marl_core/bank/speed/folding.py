"""One adapted layer folded: the weight that it computes with, by PEFT's own merge on a copy of the base's layer.

The base's layer is never touched, so kinds that multiply the weight (OFT, BOFT, HRA, IA3, RoAd) are folded as those that add to it.
"""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from marl_core.bank.out_of_memory import raise_if_out_of_memory

TRIED_ROWS = 4
ROUNDING = 1e-4
"""How far a folded layer may be from the layer itself, of the largest number that it gives; float32 is off by about 1e-6."""

Folded: TypeAlias = "tuple[Tensor, Tensor | None]"
"""The weight [out, in] and the bias [out] that a layer computes with."""


def foldable_layers(model: nn.Module) -> list[Any]:
    """The linear float32 layers of `model` that its active adapter adapts; experts, whose merge goes through to their module, left out."""
    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer) and _is_foldable(layer)]


def _is_foldable(layer: Any) -> bool:
    base = getattr(layer, "base_layer", None)
    return (
        type(base) is nn.Linear
        and not isinstance(layer, ParamWrapper)
        and type(base.weight) is nn.Parameter  # a packed weight (torchao's) says float32 too, and can't be added to
        and base.weight.dtype == torch.float32
        and not layer.disable_adapters
        and not layer.merged
        and set(layer.active_adapters) <= _held(layer)
    )


def _held(layer: Any) -> set[str]:
    """The adapters that have weights of their own in a layer; PEFT calls one active in layers that it doesn't adapt, too."""
    return {name for part in layer.adapter_layer_names for name in getattr(layer, part, {})}


def is_plain_lora(layer: Any) -> bool:
    """Whether the layer computes W x + s B A x: without DoRA and other variants, without a bias of its own."""
    return isinstance(layer, LoraLinear) and all(
        name in layer.lora_A and name not in layer.lora_variant and layer.lora_B[name].bias is None
        for name in layer.active_adapters
    )


@torch.no_grad()
def fold(layer: Any) -> Folded | None:
    """What the layer computes with; None where PEFT has no rule for it. The layer and the base stay as they are."""
    base = layer.base_layer
    if is_plain_lora(layer):  # the same sum as below, in one pass over the weight
        (name,) = layer.active_adapters
        return base.weight + layer.get_delta_weight(name), base.bias
    copied = copy.copy(base)
    copied._parameters = {
        name: None if own is None else nn.Parameter(own.detach().clone(), requires_grad=False)
        for name, own in base._parameters.items()
    }
    wrapper = copy.copy(layer)
    for name, value in vars(wrapper).items():
        if type(value) in (dict, list, set):  # what is merged, and which caches hold what, is noted in these
            vars(wrapper)[name] = copy.copy(value)
    wrapper._modules["base_layer"] = copied
    try:
        wrapper.merge()
    except Exception as error:  # each kind says in its own way that it can't
        raise_if_out_of_memory(error)
        return None
    return (copied.weight.detach(), None if copied.bias is None else copied.bias.detach()) if wrapper.merged else None


@torch.no_grad()
def agrees(layer: Any, folded: Folded) -> bool:
    """Whether the layer gives what its folded weight gives, on a few random rows."""
    weight, bias = folded
    rows = torch.randn(TRIED_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    plain, fast = layer(rows), nn.functional.linear(rows, weight, bias)
    return bool((plain - fast).abs().max() <= ROUNDING * plain.abs().max())
