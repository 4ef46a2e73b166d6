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

COMPILED_VERSIONS = 128
"""Versions of a layer that may be compiled: each view, with and without gradient, packed and not. torch's own limit is 8."""
FIRST_TORCH_THAT_ROUNDS_ALIKE = (2, 13)
"""The torch whose C++ code rounds half precision where it is told to. With 2.11 the first ratio was off by 0.05."""


def refuse_what_rounds_elsewhere(layers: list[nn.Module]) -> None:
    """ConfigError for layers in half precision on a CPU where this torch can't keep the first ratio at 1."""
    halves = {weight.dtype for layer in layers for weight in layer.parameters() if weight.device.type == "cpu"}
    if halves & {torch.bfloat16, torch.float16} and _release() < FIRST_TORCH_THAT_ROUNDS_ALIKE:
        raise ConfigError(
            f"speed.compile: torch {torch.__version__} doesn't round compiled half precision on a CPU as the plain layers do: "
            f"passes with and without gradient would differ. Use torch {'.'.join(map(str, FIRST_TORCH_THAT_ROUNDS_ALIKE))} or newer, "
            "model.dtype: float32, or speed.compile: false."
        )


def _release() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def compile_layers(layers: list[nn.Module]) -> None:
    """Mark the layers: each is compiled when it is called, once for all shapes where that is possible."""
    import torch._dynamo

    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, COMPILED_VERSIONS)
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
