"""The `speed` section: which fast paths a run takes, and the sizes that estimate and run must share."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import PositiveInt

from marl_core.config.section import Renamed, Section

CPU_TOKENS = {"float32": 256, "bfloat16": 512, "float16": 512}
"""Tokens per forward and backward where neither ppo.microbatch nor speed.microbatch_tokens is set: the same bytes in each dtype.
Measured on two CPU cores (benchmarks/NOTES.md)."""
CUDA_TOKENS = 2_048
"""The same on CUDA. A guess, measured on no GPU yet: the table of docs/gpu.md says what a pass of it keeps by the memory estimate."""

MERGED_COPIES_SHARE = 0.25
"""Share of the base's bytes that merged copies of a LoRA may take (bank/speed/merged_copies.py)."""
DEAR_COPIES_SHARE = 1.0
"""The same for kinds whose layers cost several times LoRA's at each token (benchmarks/NOTES.md): all their layers have copies."""
TILE_TOKENS, TILE_VOCABULARY = 1024, 2048
"""Tokens and rows of the head's weight whose logits are computed at once (ppo/logprobs.py): 8 MiB of float32, the best of those measured in
benchmarks/NOTES.md."""


def measured_on(device: str) -> bool:
    """Whether the fast paths that a config leaves open were measured on `cpu` or `cuda`; where not, the plain path is taken."""
    return device == "cpu"


def is_on(switch: bool | None, device: str) -> bool:
    """Whether a fast path is taken on `cpu` or `cuda`: as the config says, and where it says nothing, if it was measured there."""
    return measured_on(device) if switch is None else switch


def usual_tokens(device: str, dtype: str) -> int:
    """Most tokens of a pass forward and backward on a `cpu` or `cuda` device, where the config doesn't say."""
    return CUDA_TOKENS if device == "cuda" else CPU_TOKENS[dtype]


class SpeedSection(Section, at="speed"):
    """Fast paths. Each gives the plain path's numbers to rounding; all off is the plain path (docs/speed.md)."""

    renamed: ClassVar[Renamed] = {"fold": ("merge_for_sampling", "0.1")}

    decode: Literal["marl", "transformers"] = "marl"
    """Who samples: the own loop, where finished rows leave and samples share a prefill, or transformers' `generate`."""
    merge_for_sampling: bool | None = None
    """Sample through copies of the adapted weights with the policy merged in, on a float32 base: of a LoRA up to a quarter of the base's
    bytes. Absent: on a CPU for kinds that cost several times a LoRA at each token, else false."""
    capture: bool | None = None
    """Old log-probs and values from the sampling pass itself, where the base is float32; else a pass of their own. Absent: true on a
    CPU, false on CUDA, where it hasn't been measured yet."""
    pack: bool = True
    """Rows of unequal length go through the trunk without their padding."""
    recompute_cheap: bool | None = None
    """Compute the cheap pieces between two products again in backward instead of keeping them; gradients are the same bits. Absent: true
    on a CPU, false on CUDA, where it hasn't been measured yet."""
    short_attention: bool | None = None
    """Attention over rows of up to 256 tokens as two batched products, where rows are packed. Absent: true on a CPU, false on CUDA,
    where it hasn't been measured yet."""
    trim_memory: bool | None = None
    """Give freed memory back to the system between the phases of a step; `marl run` also sets its process up for it (docs/speed.md).
    Absent: true on a CPU, false on CUDA, where it hasn't been measured yet."""
    compile: bool = False
    """Run the decoder layers through torch.compile in scoring and update: for long runs, see docs/speed.md. Sampling stays plain."""
    microbatch_tokens: PositiveInt | None = None
    """Most tokens per forward and backward without ppo.microbatch. Absent: 2,048 on CUDA (a guess), 512 on a CPU (float32: 256)."""
