"""MiSS: one matrix in the place of LoRA's two, shared along the inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from marl_plugins.adapter import counts
from marl_plugins.adapter.base import SECTION, Layers, PeftKind, Shapes

if TYPE_CHECKING:
    from marl_core import Plan

FORMS: dict[str, Any] = {"balance": True, "bat": "bat", "mini": "mini"}


class Miss(PeftKind):
    """MiSS: one matrix beside each layer, used again along its inputs; about half of a LoRA's numbers at the same rank."""

    peft_type: ClassVar[str] = "miss"

    r: PositiveInt = Field(default=64, description="Rank. It must not be above the layers' input width.")
    form: Literal["balance", "bat", "mini"] = Field(
        default="balance",
        description="balance: the plain one. bat: it also depends on the weight; r must divide the layers' widths. mini: also shared "
        "along the outputs.",
    )
    mini: PositiveInt = Field(
        default=1, description="Columns of the matrix of form mini; it must divide the layers' outputs."
    )

    def peft_options(self, layers: Layers, shapes: Shapes) -> dict[str, Any]:
        """PEFT names the form by how weights start."""
        return {"r": self.r, "init_weights": FORMS[self.form], "mini_r": self.mini}

    def own_names(self) -> dict[str, str]:
        """For messages."""
        return {"init_weights": "form", "mini_r": "mini"}

    def wrong(self, plan: Plan) -> Iterator[str]:
        """A number of another form."""
        yield from super().wrong(plan)
        if self.form != "mini" and self.mini != 1:
            yield f"{SECTION}.mini: {self.mini} is only used with form: mini; remove it."

    def learned(self, layers: Layers, shapes: Shapes) -> int:
        """r numbers for each output, and r times `mini` of the smallest form."""
        return counts.learned(self.peft_type, self.peft_options(layers, shapes), layers, shapes)

    def said(self, layers: Layers) -> str:
        """The rank, and the form where it isn't the plain one."""
        return f"r={self.r}{'' if self.form == 'balance' else f', {self.form}'}"
