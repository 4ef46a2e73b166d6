"""Attention without padding: rows of unequal length go through the trunk as one packed row, and only attention sees them apart.

The function is registered with transformers under the name "marl" when a model first wants it. Without a `Layout` it is
transformers' own sdpa,
except where a product of small matrices is faster on a CPU (figures in benchmarks/NOTES.md). The layout travels as an
argument, so gradient checkpointing recomputes with the same one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from marl_core.bank.speed.recompute import again

NAME = "marl"
SHORT = 256  # keys up to which explicit products beat the CPU's fused kernel: 2x in float32, 9x in bfloat16 backward


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each of the N packed tokens stands in a right-padded [rows, width] block; `place` is None when none is padded."""

    rows: int
    width: int
    place: Tensor | None

    @classmethod
    def of(cls, mask: Tensor) -> Layout:
        """The layout of the tokens that `mask` [B, L] keeps, row by row."""
        lengths = mask.sum(dim=1)
        width = int(lengths.max())
        if bool((lengths == width).all()):
            return cls(len(mask), width, None)
        kept = torch.arange(width, device=mask.device) < lengths[:, None]
        return cls(len(mask), width, kept.flatten().nonzero().squeeze(1))

    def spread(self, packed: Tensor) -> Tensor:
        """[1, heads, N, dim] -> [rows, heads, width, dim]."""
        tokens = packed[0].transpose(0, 1)
        if self.place is not None:
            block = tokens.new_zeros(self.rows * self.width, *tokens.shape[1:])
            tokens = block.index_copy(0, self.place, tokens)
        return tokens.reshape(self.rows, self.width, *tokens.shape[1:]).transpose(1, 2)

    def gather(self, block: Tensor) -> Tensor:
        """[rows, width, heads, dim] -> [1, N, heads, dim]."""
        tokens = block.reshape(self.rows * self.width, *block.shape[2:])
        return (tokens if self.place is None else tokens.index_select(0, self.place))[None]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, heads, L, dim], key and value with their own heads -> [B, L, heads, dim]."""
    if layout is not None:
        query, key, value = layout.spread(query), layout.spread(key), layout.spread(value)
    if getattr(module, "is_causal", True) and _small(query, key, value, attention_mask, dropout, options):
        out = again(partial(_products, scaling=scaling), query, key, value)
    else:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    return (out if layout is None else layout.gather(out)), None


def _small(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, options: dict[str, Any]
) -> bool:
    """Whether explicit products are right and faster: causal without holes, short rows, on a CPU."""
    plain = mask is None and not dropout and options.get("is_causal") is not False
    plain = plain and options.get("position_bias") is None and options.get("softcap") is None
    causal = query.shape[2] in (1, key.shape[2])
    return plain and causal and query.device.type == "cpu" and key.shape[2] <= SHORT


def _products(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Softmax attention by two batched products a key head; queries that share it stand below one another."""
    batch, heads, length, dim = query.shape
    shared = heads // key.shape[1]
    grouped = query.reshape(batch, key.shape[1], shared * length, dim)
    scores = (grouped @ key.transpose(-1, -2)).float() * (dim**-0.5 if scaling is None else scaling)
    if length > 1:
        later = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.view(batch, heads, length, -1).masked_fill(later, -torch.inf).view_as(scores)
    weights = scores.softmax(dim=-1).to(value.dtype)
    return (weights @ value).view(batch, heads, length, -1).transpose(1, 2).contiguous()  # as transformers' own is


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """The mask that sdpa would get; none while packed rows go through, whose layout says it all."""
    return None if _packed.get() else sdpa_mask(*args, **options)


_packed = ContextVar("marl_packed", default=False)


@contextmanager
def without_mask() -> Iterator[None]:
    """Inside, transformers makes no attention mask: the tokens are packed."""
    before = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(before)


@cache
def register() -> None:
    """Tell transformers of `attend`, when a model first wants it: importing this changes nothing for anybody."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)
