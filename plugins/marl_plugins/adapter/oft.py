"""OFT: the inputs of each layer are turned by small rotations."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from marl_plugins.adapter import counts
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
        return counts.learned(self.peft_type, self.peft_options(layers, shapes), layers, shapes)

    def held(self, layers: Layers, shapes: Shapes) -> int:
        """Two tables of places for each layer."""
        return counts.held(self.peft_type, self.peft_options(layers, shapes), layers, shapes)

    def said(self, layers: Layers) -> str:
        """The block's size, and that of the blocks that are made where it is another."""
        made = counts.oft_blocks(self.peft_options(layers, {}), layers)
        other = f" (made: {', '.join(map(str, made))})" if made not in ([], [self.block]) else ""
        return f"block {self.block}{other}{', exact' if self.exact else ''}"
