"""A base too big for one device: each process holds its share of every layer (FSDP2) and fetches the rest as it computes.

The layers are sharded before any adapter is put on them, so adapters stay plain tensors, whole on every process: they
are switched, trained and saved as ever, and only the frozen weights travel. Embedding, last norm and LM head stay
whole too: the LM head is applied without going through the model. The body is the root, because passes start there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from marl_core.bank.layers import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard_base(base: PreTrainedModel, device: str) -> PreTrainedModel:
    """Shard the layers of `base` over the processes of the default group, one after the other, onto `device`.

    ConfigError when its layers can't be told from the rest.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    body: nn.Module = getattr(base, base.base_model_prefix, base)
    layers = decoder_layers(body, "model.shard: fsdp2", "model.shard: none")
    base.requires_grad_(False)
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    sharded = {p for layer in layers for p in layer.parameters()}
    fully_shard(body, mesh=mesh, ignored_params={p for p in body.parameters() if p not in sharded})
    _move_rest(base, sharded, torch.device(device))
    return base


def _move_rest(base: nn.Module, sharded: set[nn.Parameter], device: torch.device) -> None:
    """Embedding, norm, head and all buffers; tied weights stay tied, because the tensors behind them are moved."""
    for module in base.modules():
        for parameter in module.parameters(recurse=False):
            if parameter not in sharded:
                parameter.data = parameter.data.to(device)
        buffers: dict[str, Any] = module._buffers
        for name, buffer in buffers.items():
            if buffer is not None:
                buffers[name] = buffer.to(device)
