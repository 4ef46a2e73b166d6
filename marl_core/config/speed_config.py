"""The `speed` section: which fast paths a run takes."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from marl_core.config.part import Part


class SpeedPart(Part):
    """Fast paths. Each gives the plain path's numbers to rounding; all off is the plain path (docs/speed.md)."""

    decode: Literal["marl", "transformers"] = "marl"
    """Who samples: the own loop, where finished rows leave and samples share a prefill, or transformers' `generate`."""
    fold: bool = False
    """Sample through copies of the adapted weights with the policy folded in: float32 bases, up to a quarter of their size."""
    capture: bool = True
    """Old log-probs and values from the sampling pass itself, where the base is float32; else a pass of their own."""
    pack: bool = True
    """Rows of unequal length go through the trunk without their padding."""
    compile: bool = False
    """Run the decoder layers through torch.compile in scoring and update: for long runs, see docs/speed.md. Sampling stays plain."""
    microbatch_tokens: PositiveInt | None = None
    """Most tokens per forward and backward where ppo.microbatch isn't set. Absent: 16,384 on CUDA, 512 on a CPU, 256 there in float32."""
