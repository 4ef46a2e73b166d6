"""TinyLoRA: a few numbers for each layer, spread over it by fixed random projections."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, PositiveInt

from marl_plugins.adapter import counts
from marl_plugins.adapter.base import Layers, PeftKind, Shapes


class Tinylora(PeftKind):
    """TinyLoRA: `u` numbers for each layer turn its own main directions; layers may share theirs (arXiv 2602.04118)."""

    peft_type: ClassVar[str] = "tinylora"

    u: PositiveInt = Field(default=64, description="Numbers that learn for each layer, or for each group of layers.")
    r: PositiveInt = Field(default=2, description="Main directions of a weight that are turned.")
    tie: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.0, description="How far layers share their numbers: 0 each has its own, 1 all share one set of `u`."
    )

    def peft_options(self, layers: Layers, shapes: Shapes) -> dict[str, Any]:
        """PEFT's names."""
        return {"r": self.r, "u": self.u, "weight_tying": self.tie}

    def own_names(self) -> dict[str, str]:
        """For messages."""
        return {"weight_tying": "tie"}

    def learned(self, layers: Layers, shapes: Shapes) -> int:
        """`u` for each group of layers."""
        return counts.learned(self.peft_type, self.peft_options(layers, shapes), layers, shapes)

    def held(self, layers: Layers, shapes: Shapes) -> int:
        """Per layer float32: the directions r (in + out), and the projections [u, r, r]."""
        return counts.held(self.peft_type, self.peft_options(layers, shapes), layers, shapes)

    def said(self, layers: Layers) -> str:
        """How many numbers, and how far they are shared."""
        return f"u={self.u}, r={self.r}{f', tie {self.tie:g}' if self.tie else ''}"
