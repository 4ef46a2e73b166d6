"""Log-probs of chosen tokens: marl's tiles, plain logits, and Liger's fused linear cross entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from aside import attempt
from record import Skip
from timing import Timed, apart, relative, timed
from torch import Tensor

from marl_core.ppo import logprobs as tiled

SIZES: dict[str, dict[str, tuple[int, int, int, str]]] = {
    "full": {
        "logprobs small": (4096, 2048, 32_000, "bfloat16"),
        "logprobs large": (16_384, 4096, 128_256, "bfloat16"),
        "logprobs float32": (4096, 2048, 32_000, "float32"),
        "logprobs many words": (4096, 2048, 128_256, "bfloat16"),
        "logprobs many tokens": (16_384, 2048, 32_000, "bfloat16"),
        "logprobs wide": (4096, 4096, 32_000, "bfloat16"),
        "logprobs many of both": (16_384, 2048, 128_256, "bfloat16"),
        "logprobs wide, many words": (4096, 4096, 128_256, "bfloat16"),
        "logprobs wide, many tokens": (16_384, 4096, 32_000, "bfloat16"),
    },
    "tiny": {
        "logprobs small": (128, 64, 2000, "bfloat16"),
        "logprobs large": (256, 128, 5000, "bfloat16"),
        "logprobs float32": (128, 64, 2000, "float32"),
    },
}
"""Tokens, hidden width, words, dtype."""
WITH_ENTROPY = ("logprobs small", "logprobs large")
TILES = {
    "full": [(1024, 2048), (4096, 8192), (16_384, 8192), (4096, 32_768), (16_384, 131_072)],
    "tiny": [(1024, 2048), (64, 512), (256, 8192)],
}
TILED = {"full": ("logprobs small", "logprobs many of both"), "tiny": ("logprobs large",)}
"""The sizes at which tiles are compared."""

Way: TypeAlias = Callable[[Tensor, bool], tuple[Tensor, Tensor]]
"""Hidden states, whether entropies are wanted -> log-probs, entropies."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Random states, a head whose logits spread by about two, chosen tokens, and what each log-prob weighs in the loss."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    shares: Tensor
    device: str

    @classmethod
    def of(cls, tokens: int, width: int, words: int, dtype: str, device: str) -> Inputs:
        """The same numbers each time on one device."""
        random = torch.Generator(device=device).manual_seed(0)
        kind = getattr(torch, dtype)
        hidden = torch.randn(tokens, width, generator=random, device=device, dtype=kind)
        weight = torch.randn(words, width, generator=random, device=device, dtype=kind) * (2 * width**-0.5)
        targets = torch.randint(0, words, (tokens,), generator=random, device=device)
        shares = torch.randn(tokens, generator=random, device=device)
        return cls(hidden.requires_grad_(), weight, targets, shares, device)

    def marl(self, hidden: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        """Tiles: never all the logits."""
        return tiled.chosen_logprobs(hidden, self.weight, None, self.targets, 1.0, entropy)

    def plain(self, hidden: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        """All the logits."""
        return tiled.logits_logprobs(hidden @ self.weight.T, self.targets, 1.0, entropy)

    def forward(self, way: Way, entropy: bool) -> tuple[Tensor, Tensor]:
        """Without gradient."""
        with torch.no_grad():
            return way(self.hidden, entropy)

    def both(self, way: Way, entropy: bool) -> Tensor:
        """Forward and backward: the gradient of the weighted log-probs, and of some entropy."""
        self.hidden.grad = None
        logprobs, entropies = way(self.hidden, entropy)
        loss = (logprobs * self.shares).sum()
        (loss + 0.1 * entropies.sum() if entropy else loss).backward()
        assert self.hidden.grad is not None
        return self.hidden.grad

    def liger(self) -> Tensor:
        """Forward and backward of the summed cross entropy; the head is frozen, so no gradient of it is made."""
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        self.hidden.grad = None
        loss: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(self.weight, self.hidden, self.targets)
        loss.backward()
        return loss.detach()


def measurements(device: str, shape: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name."""
    found = {name: _size(name, device, shape) for name in SIZES[shape]}
    return {**found, "logprobs tiles": lambda: tiles(device, shape)}


def _size(name: str, device: str, shape: str) -> Callable[[], dict[str, Any]]:
    return lambda: compared(*SIZES[shape][name], device, name in WITH_ENTROPY)


def _timed(work: Callable[[], object], device: str) -> Timed:
    return timed(work, device, repeat=5, at_most=0.4)


def compared(tokens: int, width: int, words: int, dtype: str, device: str, entropy: bool) -> dict[str, Any]:
    """marl, plain logits and Liger at one size: milliseconds, peak memory, and how far each is from plain logits."""
    inputs = Inputs.of(tokens, width, words, dtype, device)
    row: dict[str, Any] = {}
    for name, way in (("marl", inputs.marl), ("plain", inputs.plain)):
        row |= attempt(name, lambda name=name, way=way: _way(inputs, name, way, entropy))  # type: ignore[misc]
    row |= attempt("difference", lambda: _differences(inputs, entropy))
    row |= attempt("liger", lambda: _liger(inputs))
    first = {
        f"marl_of_{name}": round(row["marl_ms"] / row[f"{name}_ms"], 3)
        for name in ("plain", "liger")
        if f"{name}_ms" in row and "marl_ms" in row
    }
    return {**first, **row, "tokens": tokens, "hidden": width, "words": words, "dtype": dtype}


def _way(inputs: Inputs, name: str, way: Way, entropy: bool) -> dict[str, Any]:
    found = _timed(lambda: inputs.forward(way, False), inputs.device).figures(f"{name}_forward")
    found |= _timed(lambda: inputs.both(way, False), inputs.device).figures(name)
    if entropy:
        found |= _timed(lambda: inputs.forward(way, True), inputs.device).figures(f"{name}_entropy_forward")
        found |= _timed(lambda: inputs.both(way, True), inputs.device).figures(f"{name}_entropy")
    return found


def _differences(inputs: Inputs, entropy: bool) -> dict[str, Any]:
    """Of log-probs and entropies in nats, and of the gradient, as a share of its length."""
    marl, plain = inputs.forward(inputs.marl, entropy), inputs.forward(inputs.plain, entropy)
    found = {"logprob_apart": apart(marl[0], plain[0])}
    if entropy:
        found["entropy_apart"] = apart(marl[1], plain[1])
    mine = inputs.both(inputs.marl, entropy).clone()
    return {**found, "gradient_relative": relative([mine], [inputs.both(inputs.plain, entropy)])}


def _liger(inputs: Inputs) -> dict[str, Any]:
    if inputs.device != "cuda":
        raise Skip("Liger's kernels need a GPU")
    try:
        import liger_kernel.transformers  # noqa: F401
    except ImportError as error:
        raise Skip(f"liger_kernel can't be imported: {error}") from error
    figures = _timed(inputs.liger, inputs.device).figures("liger")
    loss = inputs.liger()
    assert inputs.hidden.grad is not None
    mine = inputs.hidden.grad.clone()
    inputs.hidden.grad = None
    logprobs, _ = inputs.plain(inputs.hidden, False)
    logprobs.sum().neg().backward()
    return {
        **figures,
        "liger_is": "summed cross entropy, head frozen, forward and backward; one gradient for all tokens, no log-prob of each",
        "liger_mean_apart": abs(float(loss) + float(logprobs.detach().double().sum())) / len(logprobs),
        "liger_gradient_relative": relative([mine], [inputs.hidden.grad]),
    }


@contextmanager
def tile_size(tokens: int, words: int) -> Iterator[None]:
    """marl's tiles are of this size inside."""
    before = tiled.TILE_TOKENS, tiled.TILE_VOCABULARY
    tiled.TILE_TOKENS, tiled.TILE_VOCABULARY = tokens, words
    try:
        yield
    finally:
        tiled.TILE_TOKENS, tiled.TILE_VOCABULARY = before


def tiles(device: str, shape: str) -> dict[str, Any]:
    """marl's log-probs with tiles of several sizes; the first is the one that marl has."""
    row: dict[str, Any] = {}
    for size in TILED[shape]:
        inputs = Inputs.of(*SIZES[shape][size], device)
        found: dict[str, Any] = {}
        for tokens, words in TILES[shape]:
            with tile_size(tokens, words):
                found[f"{tokens}x{words}"] = attempt("tile", lambda inputs=inputs: _tile(inputs))  # type: ignore[misc]
        done = {name: tile["ms"] for name, tile in found.items() if "ms" in tile}
        best = min(done, key=lambda name: done[name], default="none")
        row[size.removeprefix("logprobs ")] = {"best": best, "tiles": found}
        del inputs
    return row


def _tile(inputs: Inputs) -> dict[str, Any]:
    found = _timed(lambda: inputs.forward(inputs.marl, False), inputs.device).figures("forward")
    return found | _timed(lambda: inputs.both(inputs.marl, False), inputs.device).figures()
