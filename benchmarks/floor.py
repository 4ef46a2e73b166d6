"""The FLOP floor of one PPO step: what the mathematics needs, at the matmul speed this machine reaches in this dtype."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from workloads import Work


def matmul_peak(dtype: str, device: str, seconds: float = 0.5) -> float:
    """Best sustained FLOP/s of a square matmul: the median of several, over a few sizes, the best size counts."""
    import torch

    kind = getattr(torch, dtype)
    sizes = (1024, 1536, 2048) if device == "cpu" else (4096, 8192)
    best = 0.0
    for size in sizes:
        a = torch.randn(size, size, device=device).to(kind)
        b = torch.randn(size, size, device=device).to(kind)
        best = max(best, 2 * size**3 / _median_seconds(partial(torch.mm, a, b), device, seconds))
    return best


def copy_bandwidth(device: str, seconds: float = 0.2) -> float:
    """Bytes a second that a large copy on the device reads and writes, both counted: the median of several."""
    import torch

    count = 2**26 if device == "cpu" else 2**30  # bytes: past every cache
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / _median_seconds(partial(target.copy_, source), device, seconds)


def _median_seconds(work: Callable[[], object], device: str, seconds: float) -> float:
    """Median of five runs and more, for so many seconds, after one to warm up."""
    import torch

    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 6 or time.perf_counter() - start < seconds:
        if device != "cpu":
            torch.cuda.synchronize()
        before = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    return statistics.median(times[1:])


def parameters(config: Any) -> tuple[int, int]:
    """Weights that multiply: of the trunk's linear layers, and of the LM head."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    attention = hidden * head_dim * (2 * heads + 2 * kv)
    mlp = 3 * hidden * config.intermediate_size
    return layers * (attention + mlp), hidden * config.vocab_size


def step_flops(work: Work, config: Any) -> dict[str, float]:
    """FLOPs by phase: rollout 1x, reference 1x, reward 1x (no head), update 2x an epoch (the base is frozen).

    Real tokens only: the prompt and the response that is there. Attention's own products and the adapters are left out
    (below 3 % on these lengths), so the floor is a little too low, never too high.
    """
    trunk, head = parameters(config)
    sequence = work.prompts * work.prompt_tokens + work.tokens
    pass_trunk, pass_head = 2.0 * trunk * sequence, 2.0 * head * work.tokens
    return {
        "generate": pass_trunk + pass_head,
        "score": pass_trunk + pass_head + pass_trunk,
        "update": work.epochs * 2 * (pass_trunk + pass_head),
    }
