"""What a run does to the process it runs in: memory, threads, the clock, and what libraries print.

glibc keeps what was freed for later, and before 2.38 it doesn't find freed blocks again for aligned requests, as all of torch's are: what
one phase, or one layer computed again, has freed would stay resident beside what the next one needs. And in half precision
the kernels made for each shape of a product are kept; rows of unequal length give a new shape nearly every time.

torch is imported where it is needed and no earlier: the command line sets its process up before.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ALIGN_VARIABLE = "THP_MEM_ALLOC_ENABLE"
"""Torch's own: blocks of 2 MiB and more begin at a page, and the system is asked for huge pages there."""
KERNEL_CACHE_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's own, and that of torch's layer above it: for how many shapes each keeps kernels; 1,024 unless told."""
KERNEL_CACHE_CAPACITY = (
    "32"  # a pass forward and backward meets about 20 shapes; each kernel holds 0.6 MiB (figures in docs/speed.md)
)
DATASETS_BARS_VARIABLE = "HF_DATASETS_DISABLE_PROGRESS_BARS"
"""datasets' own, for the bars it draws while it reads a data set. It is read at the import, which is too heavy for one setting."""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

QUIET_LOGGERS = {
    "bitsandbytes": logging.CRITICAL,  # a CPU kernel for 4-bit weights is missing: the plain one is used
    "transformers.distributed.tensor_parallel": logging.ERROR,  # "layers were not sharded": there is one process
    "torchao": logging.ERROR,  # kernels for other machines; peft imports it wherever it is installed
    "torch.utils._pytree": logging.ERROR,  # torchao registers its enums in a way that torch will give up
}
"""Loggers of what libraries say on every run and is known and harmless here, and the level from which they still speak."""
HARMLESS_WARNINGS = (
    (r".*is_gradient_checkpointing.*", FutureWarning),  # transformers renamed a property that peft still reads
    (r".*MatMul8bitLt: inputs will be cast.*", UserWarning),  # once for each int8 layer
)


# -- the environment of a process that is marl's own --------------------------------------------------------------------


def set_up_process() -> None:
    """Both settings below, for a process that is marl's own: the command line, or a script that calls this before its first tensor.

    They are environment variables, which children of the process get too. So importing marl sets none of them: a program
    that marl is a part of decides for itself.
    """
    align_large_blocks()
    limit_kernel_caches()


def align_large_blocks() -> None:
    """Turn torch's switch on, unless the user has set it or the system knows no huge pages. Torch reads it at its first large tensor."""
    if HUGE_PAGES.exists():
        os.environ.setdefault(ALIGN_VARIABLE, "1")


def limit_kernel_caches() -> None:
    """Let oneDNN and torch forget kernels of shapes long gone, unless the user has set how many they keep.

    Both read this at their first product.
    """
    for name in KERNEL_CACHE_VARIABLES:
        os.environ.setdefault(name, KERNEL_CACHE_CAPACITY)


def quiet_libraries() -> None:
    """Silence what libraries print on every run and is known to be harmless, and their bars of loading: the output is the run's.

    `marl` calls it; a script or a notebook may, before it makes a Runner. Importing marl alone silences nothing.

    Bars of downloads stay on a terminal: they are what a person waits for.
    """
    for name, level in QUIET_LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    for message, category in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    os.environ.setdefault(DATASETS_BARS_VARIABLE, "1")
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # imported there without a word for checkers
        are_progress_bars_disabled,
        enable_progress_bars,
    )
    from transformers.utils import logging as transformers_logging

    downloads_shown = sys.stderr.isatty() and not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # of weights; and of downloads, too
    if downloads_shown:
        enable_progress_bars()


# -- in each phase of a run --------------------------------------------------------------------------------------------


def trim_heap() -> bool:
    """Return freed pages to the system, in milliseconds; whether this C library can."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
    return trim is not None


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; None with another C library."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None
    return trim


@contextmanager
def timed(seconds: dict[str, float], phase: str, device: torch.device) -> Iterator[None]:
    """Add a block's wall-clock seconds to `seconds[phase]`, after waiting until `device` has computed all of it."""
    _finish(device)
    start = time.perf_counter()
    try:
        yield
    finally:
        _finish(device)
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def _finish(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def default_torch_modes() -> Iterator[None]:
    """A block with gradients on, inference mode and autocast off, whatever block of torch's the caller is in."""
    import torch

    with ExitStack() as blocks:
        blocks.enter_context(torch.inference_mode(False))
        blocks.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            blocks.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """A block that computes with `number` CPU threads, with as many as before when None."""
    import torch

    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
