"""Attention over rows of unequal length: marl's spread and gather, flash attention with variable lengths, and padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from aside import attempt
from record import Skip
from timing import apart, relative, timed
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from marl_core.bank.speed.packing import Layout, attend

SIZES = {"full": (64, 64, 512, 32, 8, (64, 128)), "tiny": (6, 4, 24, 4, 2, (16,))}
"""Rows, shortest and longest, heads, key heads, widths of a head."""

Run = Callable[[], tuple[Tensor, ...]]
"""-> output [N, heads, dim] of the packed tokens, and the gradients of queries, keys and values [N, heads, dim]."""


def measurements(device: str, shape: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name."""
    widths = SIZES[shape][-1]
    return {f"attention {dim}": _width(device, shape, dim) for dim in widths}


def _width(device: str, shape: str, dim: int) -> Callable[[], dict[str, Any]]:
    return lambda: compared(device, shape, dim)


@dataclass(frozen=True, slots=True)
class Packed:
    """Packed queries, keys and values [N, heads, dim], the gradient of the output, and how the rows lie."""

    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor
    mask: Tensor
    layout: Layout
    module: nn.Module

    @classmethod
    def of(cls, device: str, shape: str, dim: int, dtype: torch.dtype) -> Packed:
        """Rows with lengths spread evenly, neighbours unlike."""
        rows, low, high, heads, keys, _ = SIZES[shape]
        spread = torch.linspace(low, high, rows).round().long()
        lengths = spread[torch.arange(rows) * 13 % rows].to(device)
        mask = torch.arange(high, device=device) < lengths[:, None]
        tokens = int(lengths.sum())
        random = torch.Generator(device=device).manual_seed(0)

        def some(heads: int) -> Tensor:
            return torch.randn(tokens, heads, dim, generator=random, device=device, dtype=torch.float32).to(dtype)

        module = nn.Module()
        module.num_key_value_groups = heads // keys
        module.is_causal = True
        query, key, value = (some(count).requires_grad_() for count in (heads, keys, keys))
        return cls(query, key, value, some(heads), mask, Layout.of(mask), module)

    @property
    def packed(self) -> tuple[Tensor, ...]:
        """As the model has them, [1, heads, N, dim]."""
        return tuple(tensor.transpose(0, 1)[None] for tensor in (self.query, self.key, self.value))

    def grads(self, out: Tensor) -> tuple[Tensor, ...]:
        """Of queries, keys and values."""
        return torch.autograd.grad(out, (self.query, self.key, self.value), self.gradient)

    def marl(self) -> tuple[Tensor, ...]:
        """marl's own."""
        query, key, value = self.packed
        out = attend(self.module, query, key, value, None, layout=self.layout)[0][0]
        return out, *self.grads(out)

    def variable(self, cumulated: Tensor, longest: int, grouped: bool) -> tuple[Tensor, ...]:
        """Flash attention with variable lengths; `grouped`: the kernel shares key heads by itself, else they are repeated."""
        key, value = self.key, self.value
        if not grouped:
            times = self.query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(times, dim=1) for tensor in (key, value))
        out = _flash(self.query, key, value, cumulated, longest)
        return out, *self.grads(out)


def _flash(query: Tensor, key: Tensor, value: Tensor, cumulated: Tensor, longest: int) -> Tensor:
    """Causal, by torch's public function where there is one, else by the operator beneath it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        found = torch.ops.aten._flash_attention_forward(
            query, key, value, cumulated, cumulated, longest, longest, 0.0, True, False
        )
        out: Tensor = found[0]
        return out
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known and query.shape[1] != key.shape[1]:
        options["enable_gqa"] = True
    attended: Any = varlen_attn(query, key, value, cumulated, cumulated, longest, longest, **options)
    only: Tensor = attended
    return only


def compared(device: str, shape: str, dim: int) -> dict[str, Any]:
    """All ways at one width of a head, forward and backward, in bfloat16; how far each is from float32 on padded rows."""
    packed = Packed.of(device, shape, dim, torch.bfloat16)
    rows, low, high, heads, keys, _ = SIZES[shape]
    row: dict[str, Any] = {}
    exact = _padded(Packed.of(device, shape, dim, torch.float32), masked=False, packs=True)()
    ways: dict[str, Callable[[], Run]] = {
        "marl": lambda: packed.marl,
        "padded": lambda: _padded(packed, masked=False, packs=True),
        "padded_block": lambda: _padded(packed, masked=False, packs=False),
        "padded_mask": lambda: _padded(packed, masked=True, packs=False),
        "variable": lambda: _variable(packed, device, row),
    }
    for name, make in ways.items():
        row |= attempt(name, lambda name=name, make=make: _way(name, make(), exact, device))  # type: ignore[misc]
    if "marl_ms" in row and "variable_ms" in row:
        row = {"marl_of_variable": round(row["marl_ms"] / row["variable_ms"], 3), **row}
    about = {
        "rows": rows,
        "lengths": [low, high],
        "tokens": len(packed.query),
        "padded_tokens": rows * high,
        "heads": heads,
        "key_heads": keys,
        "dim": dim,
        "dtype": "bfloat16",
        "is": "forward and backward; distances are from padded rows in float32",
    }
    return {**row, **about}


def _way(name: str, run: Run, exact: tuple[Tensor, ...], device: str) -> dict[str, Any]:
    figures = timed(run, device, repeat=9, at_most=0.4, warm=2).figures(name)
    out, *grads = run()
    if out.shape == exact[0].shape:  # blocks hold padding too
        figures |= {f"{name}_apart": apart(out, exact[0]), f"{name}_gradient_relative": relative(grads, exact[1:])}
    return figures


def _padded(packed: Packed, *, masked: bool, packs: bool) -> Run:
    """sdpa on padded rows: causal alone, which is right for padding behind the rows, or told by a mask, as transformers tells it.

    `packs`: the tokens come and go packed, through masks; else the block is there already, and its padding stays in it.
    """
    mask, module = packed.mask, packed.module
    told = None
    if masked:
        width = mask.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=mask.device).tril()
        told = causal[None, None] & mask[:, None, None, :]

    def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        out: Tensor = sdpa_attention_forward(module, heads[0], heads[1], heads[2], told)[0]
        return out

    def block(tensor: Tensor) -> Tensor:
        return tensor.new_zeros(*mask.shape, *tensor.shape[1:]).masked_scatter(mask[..., None, None], tensor)

    if packs:

        def through() -> tuple[Tensor, ...]:
            out = attended(*(block(tensor) for tensor in (packed.query, packed.key, packed.value)))[mask]
            return out, *packed.grads(out)

        return through
    blocks = [block(tensor.detach()).requires_grad_() for tensor in (packed.query, packed.key, packed.value)]
    gradient = block(packed.gradient)

    def inside() -> tuple[Tensor, ...]:
        out = attended(*blocks)
        return out, *torch.autograd.grad(out, blocks, gradient)

    return inside


def _variable(packed: Packed, device: str, row: dict[str, Any]) -> Run:
    """The kernel with shared key heads where it takes them."""
    if device != "cuda":
        raise Skip("flash attention with variable lengths needs a GPU")
    lengths = packed.mask.sum(dim=1)
    cumulated = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    try:
        packed.variable(cumulated, longest, True)
        torch.cuda.synchronize()
        row["variable_key_heads"] = "shared by the kernel"
        return lambda: packed.variable(cumulated, longest, True)
    except (RuntimeError, ValueError, TypeError) as error:
        row["variable_key_heads"] = f"repeated: {' '.join(str(error).split())[:160]}"
        return lambda: packed.variable(cumulated, longest, False)
