"""A key-value cache of known size: written in place instead of grown by copying, and rows can leave it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values [B, heads, room, dim], of which the first `length` positions are filled."""

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        self._room = room
        self._length = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Write the new positions, return all that are filled."""
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
            self._buffers = (self._empty(key_states), self._empty(value_states))
        end = self._length + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._length : end] = states
        self._length = end
        return self._show()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row: samples of one prompt share its prefill."""
        self._change(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        self._change(lambda buffer: buffer.index_select(0, indices))

    def _change(self, change: Any) -> None:
        if self._buffers is not None:
            self._buffers = (change(self._buffers[0]), change(self._buffers[1]))
            self._show()

    def _empty(self, states: Tensor) -> Tensor:
        batch, heads, _, dim = states.shape
        return torch.empty(batch, heads, self._room, dim, dtype=states.dtype, device=states.device)

    def _show(self) -> tuple[Tensor, Tensor]:
        assert self._buffers is not None
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)
        return self.keys, self.values


def new_cache(config: Any, room: int) -> DynamicCache:
    """The cache that transformers would use for this model, with in-place layers wherever it is a plain growing one."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
