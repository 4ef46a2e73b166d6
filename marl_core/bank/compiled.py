"""The trunk's decoder layers through torch.compile, an option (docs/speed.md says where it pays).

Layers are compiled one by one: they share their code, so a view costs seconds, not the minutes of a whole model. Half precision is
rounded where the plain layers round. Otherwise passes with and without gradient, which are fused differently, would differ by
0.2 nat, and the first ratio not be 1. Sampling stays plain: its cache grows by a place a token.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from marl_core.errors import ConfigError

VARIANTS = 128
"""Versions of a layer that may be compiled: each view, with and without gradient, packed and not. torch's own limit is 8."""


def compile_layers(layers: list[nn.Module]) -> None:
    """Mark the layers: each is compiled when it is called, once for all shapes where that is possible."""
    import torch._dynamo

    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS)
    options: dict[str, Any] = {"emulate_precision_casts": True}
    for layer in layers:
        layer.compile(dynamic=True, options=options)


def stance(compiled: bool) -> AbstractContextManager[Any]:
    """While open, marked layers run compiled or plain."""
    return nullcontext() if compiled else torch.compiler.set_stance("force_eager")


def cannot(error: Exception) -> ConfigError:
    """What a failure to compile means to the user."""
    text = " ".join(str(error).split())
    return ConfigError(
        f"speed.compile: torch could not compile this model's layers here: {type(error).__name__}: {text:.300} "
        "It needs a C++ compiler (g++ or clang) on a CPU, and Triton on CUDA. Install it, or set speed.compile: false."
    )
