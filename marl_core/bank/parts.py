"""What of a model belongs to an adapter: asked of PEFT's layers, by their own fields, never by a name's looks.

An adapter may be called like anything else in the model (`mlp`, `0`, `weight`): only the layer that holds a tensor knows
whose it is. Every layer says in `adapter_layer_names` and `other_param_names` where it keeps what belongs to adapters, each
under the adapter's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from marl_core.artifacts.adapter_files import PEFT_PREFIX


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of an adapter: its name in the model, its name in PEFT's file, itself."""

    name: str
    file_name: str
    tensor: Tensor


def adapter_parts(model: nn.Module, adapter: str) -> Iterator[Part]:
    """The tensors, parameters and buffers, that belong to `adapter` and to no other."""
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            for field in dict.fromkeys((*layer.adapter_layer_names, *layer.other_param_names)):
                yield from _held(path, field, getattr(layer, field, None), adapter)


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of an adapter by their names in the model."""
    parts = adapter_parts(model, adapter)
    return {part.name: part.tensor for part in parts if isinstance(part.tensor, nn.Parameter)}


def file_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The adapter's tensors under the names that PEFT's file gives them, sharing memory with the model's."""
    return {part.file_name: part.tensor.detach() for part in adapter_parts(model, adapter)}


def _held(path: str, field: str, holder: Any, adapter: str) -> Iterator[Part]:
    if not isinstance(holder, Mapping | nn.Module) or adapter not in _keys(holder):
        return
    part = holder[adapter]  # type: ignore[index]
    name = f"{path}.{field}.{adapter}"
    if isinstance(part, Tensor):
        yield Part(name, f"{PEFT_PREFIX}{path}.{field}", part)
    elif isinstance(part, nn.Module):
        for inner, tensor in (*part.named_parameters(), *_kept_buffers(part)):
            # PEFT keeps DoRA's magnitudes in a layer of their own since 0.11, and in its files where they always were
            ending = "" if field == "lora_magnitude_vector" else f".{inner}"
            yield Part(f"{name}.{inner}", f"{PEFT_PREFIX}{path}.{field}{ending}", tensor)


def _keys(holder: Any) -> Any:
    return holder.keys() if hasattr(holder, "keys") else ()


def _kept_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a state dict holds."""
    kept = module.state_dict()
    return ((name, buffer) for name, buffer in module.named_buffers() if name in kept)
