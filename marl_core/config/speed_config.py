"""The `speed` section: which fast paths a run takes."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from marl_core.config.section import Section

CPU_TOKENS = {"float32": 256, "bfloat16": 512, "float16": 512}
"""Tokens per forward and backward where neither ppo.microbatch nor speed.microbatch_tokens is set: the same bytes in each dtype.
Measured on two CPU cores (benchmarks/NOTES.md)."""
CUDA_TOKENS = 2_048
"""The same on CUDA. A guess, measured on no GPU yet: the table of docs/gpu.md says what a pass of it keeps by the memory estimate."""


def measured_on(device: str) -> bool:
    """Whether the fast paths that a config leaves open were measured on `cpu` or `cuda`; where not, the plain path is taken."""
    return device == "cpu"


def usual_tokens(device: str, dtype: str) -> int:
    """Most tokens of a pass forward and backward on a `cpu` or `cuda` device, where the config doesn't say."""
    return CUDA_TOKENS if device == "cuda" else CPU_TOKENS[dtype]


class SpeedSection(Section, at="speed"):
    """Fast paths. Each gives the plain path's numbers to rounding; all off is the plain path (docs/speed.md)."""

    decode: Literal["marl", "transformers"] = "marl"
    """Who samples: the own loop, where finished rows leave and samples share a prefill, or transformers' `generate`."""
    fold: bool = False
    """Sample through copies of the adapted weights with the policy folded in: float32 bases, up to a quarter of their size."""
    capture: bool | None = None
    """Old log-probs and values from the sampling pass itself, where the base is float32; else a pass of their own. Absent: true on a
    CPU, false on CUDA, where it hasn't been measured yet."""
    pack: bool = True
    """Rows of unequal length go through the trunk without their padding."""
    recompute_cheap: bool | None = None
    """Compute the cheap pieces between two products again in backward instead of keeping them; gradients are the same bits. Absent: true
    on a CPU, false on CUDA, where it hasn't been measured yet."""
    compile: bool = False
    """Run the decoder layers through torch.compile in scoring and update: for long runs, see docs/speed.md. Sampling stays plain."""
    microbatch_tokens: PositiveInt | None = None
    """Most tokens per forward and backward without ppo.microbatch. Absent: 2,048 on CUDA (a guess), 512 on a CPU (float32: 256)."""
