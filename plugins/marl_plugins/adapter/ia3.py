"""IA3: a factor for each output, or input, of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from marl_plugins.adapter.base import Layers, PeftKind, Shapes, without_dropout
from marl_plugins.adapter.sizes import Wrong, lost_ends

if TYPE_CHECKING:
    from marl_core import Plan

FEED_FORWARD_ENDS = ("down_proj", "mlp.c_proj", "fc2", "fc_out", "dense_4h_to_h", "wo", "w2")
"""Ends of the names of layers that a feed-forward block's inner numbers go into, which IA3's paper scales."""


class Ia3(PeftKind):
    """IA3: a factor for each output of a layer, and for each input of a feed-forward block's second one."""

    peft_type: ClassVar[str] = "ia3"

    feedforward: list[str] | None = Field(
        default=None,
        description="Layers whose inputs are scaled instead of their outputs, by the ends of their names; when absent the second of each "
        "feed-forward block (down_proj, fc2, ...).",
    )

    def peft_options(self, layers: Layers, shapes: Shapes) -> dict[str, Any]:
        """PEFT wants both lists, and the second as a part of the first."""
        return {"target_modules": sorted(layers), "feedforward_modules": scaled_at_inputs(layers, self.feedforward)}

    def own_names(self) -> dict[str, str]:
        """For messages."""
        return {"feedforward_modules": "feedforward", "target_modules": "targets"}

    def wrong(self, plan: Plan) -> Iterator[str]:
        """It has no dropout."""
        yield from super().wrong(plan)
        yield from without_dropout(plan, self, "IA3")

    def misfits(self, layers: Layers, shapes: Shapes) -> Iterator[Wrong]:
        """Names of layers that aren't there."""
        if layers:
            yield from lost_ends("feedforward_modules", self.feedforward or (), layers)

    def learned(self, layers: Layers, shapes: Shapes) -> int:
        """A factor for each output, or each input."""
        at_inputs = scaled_at_inputs(layers, self.feedforward)
        return sum(columns if name in at_inputs else rows for name, (rows, columns) in layers.items())


def scaled_at_inputs(layers: Layers, ends: Iterable[str] | None) -> list[str]:
    """The layers whose inputs are scaled, by the ends of their names; None: the second of each feed-forward block."""
    wanted = FEED_FORWARD_ENDS if ends is None else tuple(ends)
    return sorted(name for name in layers if any(name == end or name.endswith(f".{end}") for end in wanted))
