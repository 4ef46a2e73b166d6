"""When memory runs out: an error that says in which phase, and which keys make it smaller."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from marl_core.config.speed_config import usual_tokens
from marl_core.errors import OutOfMemoryError, in_words

if TYPE_CHECKING:
    from marl_core.config.run_config import RunConfig

OUT_OF_MEMORY_MESSAGES = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "not enough memory",
)
"""What torch's own RuntimeErrors say where it has no class for it: on a CPU, and in libraries of CUDA."""


@contextmanager
def memory_told(phase: str, config: RunConfig, device: str) -> Iterator[None]:
    """A block that ends with marl's OutOfMemoryError where torch or Python finds no memory.

    What the failed computation held is let go, so that a caller can try again with less.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        said = " ".join(str(error).split()).split(" If reserved but unallocated")[0][:300]
        traceback.clear_frames(error.__traceback__)
        if device == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemoryError(
            f"{phase}: memory ran out on {device}: {type(error).__name__}: {said} {_remedy(phase, config, device)} "
            "`marl check --memory` estimates what each role takes."
        ) from error


def raise_if_out_of_memory(error: BaseException) -> None:
    """Raise the error being handled again when memory ran out: that is no fault of the model, file or adapter that was being tried."""
    if ran_out(error):
        raise error


def ran_out(error: BaseException) -> bool:
    """Whether an error means that there was no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in OUT_OF_MEMORY_MESSAGES)


def _remedy(phase: str, config: RunConfig, device: str) -> str:
    if phase == "loading":
        return "Hold the base smaller: a quantization (`marl plugins` lists them), model.dtype: bfloat16, or a smaller model."
    rows = config.sampling.at_once(config.ppo.batch, config.ppo.samples_per_prompt)
    fewer = f"Sample fewer rows at once: sampling.rows (now {rows}); it changes no token."
    if phase in ("generate", "evaluation"):
        return fewer
    tokens = config.speed.microbatch_tokens or usual_tokens(device, config.model.dtype)
    now = (
        f"ppo.microbatch (now {config.ppo.microbatch})"
        if config.ppo.microbatch
        else f"speed.microbatch_tokens (now {tokens})"
    )
    smaller = f"Make a pass smaller: {now}, or model.gradient_checkpointing: true."
    how = in_words("--resume --override", "Runner(config, resume=True, override=True)")
    resume = f" A run with checkpoints goes on by {how} with the new setting." if config.run.folder else ""
    return f"{smaller}{resume}" if phase != "pre-flight" else f"{smaller} {fewer}"
