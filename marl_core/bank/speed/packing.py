"""Attention without padding: rows of unequal length go through the trunk as one packed row, and only attention sees them apart.

Two functions are registered with transformers when a model first wants one. Without a `Layout` the first, "marl", is transformers' own
sdpa; so is the second, "marl-short", but for short rows, where two products of small matrices are faster on a CPU (figures in
benchmarks/NOTES.md). The layout travels as an argument, so gradient checkpointing recomputes with the same one.
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

from marl_core.bank.speed.recompute import recomputed

NAME = "marl"
SHORT_NAME = "marl-short"
SHORT_KEYS = 256  # up to which explicit products beat the CPU's fused kernel: 2x in float32, 9x in bfloat16 backward


def attention_name(short_attention: bool) -> str:
    """What the function is called in transformers' register: with explicit products for short rows, or without."""
    return SHORT_NAME if short_attention else NAME


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each of the N packed tokens stands in a right-padded [rows, width] block."""

    rows: int
    width: int
    index: Tensor | None
    """[N] int64, into the block's rows * width places; None when none is padded."""

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
        if self.index is not None:
            block = tokens.new_zeros(self.rows * self.width, *tokens.shape[1:])
            tokens = block.index_copy(0, self.index, tokens)
        return tokens.reshape(self.rows, self.width, *tokens.shape[1:]).transpose(1, 2)

    def gather(self, block: Tensor) -> Tensor:
        """[rows, width, heads, dim] -> [1, N, heads, dim]."""
        tokens = block.reshape(self.rows * self.width, *block.shape[2:])
        return (tokens if self.index is None else tokens.index_select(0, self.index))[None]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Layout | None = None,
    short_attention: bool = False,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, heads, L, dim], key and value with their own heads -> [B, L, heads, dim].

    `layout`: the rows come packed, [1, heads, N, dim] -> [1, N, heads, dim]. `short_attention`: explicit products for short rows.
    """
    if layout is not None:
        query, key, value = layout.spread(query), layout.spread(key), layout.spread(value)
    causal = getattr(module, "is_causal", True)
    if short_attention and causal and _fits_products(query, key, attention_mask, dropout, options):
        out = recomputed(partial(_products, scaling=scaling), query, key, value)
    else:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    return (out if layout is None else layout.gather(out)), None


def attend_short(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """`attend` with explicit products for short rows."""
    return attend(module, query, key, value, attention_mask, short_attention=True, **options)


def _fits_products(query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, options: dict[str, Any]) -> bool:
    """Whether explicit products are right, and rows short enough for them: causal attention without holes."""
    plain = mask is None and not dropout and options.get("is_causal") is not False
    plain = plain and options.get("position_bias") is None and options.get("softcap") is None
    causal = query.shape[2] in (1, key.shape[2])
    return plain and causal and key.shape[2] <= SHORT_KEYS


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
    """Tell transformers of both functions, when a model first wants one: importing this changes nothing for anybody."""
    for name, function in ((NAME, attend), (SHORT_NAME, attend_short)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, _mask)
