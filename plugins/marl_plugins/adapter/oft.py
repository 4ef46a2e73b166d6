"""OFT: the inputs of each layer are turned by small rotations."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from marl_plugins.adapter.base import Layers, PeftKind, Shapes


class Oft(PeftKind):
    """OFT: each layer's inputs are turned, in blocks, by rotations that learn; angles between weights stay."""

    peft_type: ClassVar[str] = "oft"

    block: PositiveInt = Field(
        default=32,
        ge=2,
        description="Size of a block; where a layer's width isn't a multiple, the nearest that divides it.",
    )
    exact: bool = Field(
        default=False, description="Exact rotations instead of a sum of five terms, by solving a system for each block."
    )

    def peft_options(self, layers: Layers, shapes: Shapes) -> dict[str, Any]:
        """PEFT's default is the sum."""
        return {"oft_block_size": self.block, **({"use_cayley_neumann": False} if self.exact else {})}

    def own_names(self) -> dict[str, str]:
        """For messages."""
        return {"oft_block_size": "block", "use_cayley_neumann": "exact"}

    def learned(self, layers: Layers, shapes: Shapes) -> int:
        """b (b - 1) / 2 angles of each of in / b blocks."""
        return sum(columns * (_nearest(self.block, columns) - 1) // 2 for _, columns in layers.values())

    def held(self, layers: Layers, shapes: Shapes) -> int:
        """Two tables of int64 places, b (b - 1) / 2 long, for each layer."""
        blocks = (_nearest(self.block, columns) for _, columns in layers.values())
        return sum(2 * 8 * block * (block - 1) // 2 for block in blocks)

    def said(self) -> str:
        """The block's size."""
        return f"block {self.block}{', exact' if self.exact else ''}"


def _nearest(block: int, width: int) -> int:
    """The size nearest to `block` that divides `width`, the smaller of two, as PEFT chooses it."""
    if block >= width:
        return width
    sizes = [size for size in range(1, width + 1) if width % size == 0]
    return min(sizes, key=lambda size: (abs(size - block), size))
