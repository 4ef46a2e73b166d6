"""Log-probs of chosen tokens under a frozen LM head, without ever holding [tokens, vocabulary].

The vocabulary is walked in tiles with a running maximum and sum (as in online softmax, Milakov & Gimelshein 2018), so
each tile of the head's weight is read once and its logits stay in the processor's cache. Because the head is frozen,
the gradient with respect to the hidden state is known in the same walk: d log p(x) / dh = (W_x - sum_v p_v W_v) / tau.
Backward is then one multiplication and stores [tokens, hidden] instead of [tokens, vocabulary].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_TOKENS, TILE_WORDS = 1024, 2048  # 8 MiB of float32 logits: the best of those measured in benchmarks/NOTES.md
NEVER = -1e9  # logit of a token that could not be sampled: probability 0, and no NaN in the entropy

Banned: TypeAlias = tuple[Tensor, Tensor]
"""Where which tokens could not be sampled: places [N] bool, token ids [S] int64."""


@dataclass(slots=True)
class _Walk:
    """Running sums of one pass over the vocabulary, all relative to the running maximum logit of each token."""

    top: Tensor  # [N, 1] running maximum
    mass: Tensor  # [N, 1] sum of exp(logit - top)
    chosen: Tensor  # [N, 1] logit of the target
    heat: Tensor | None  # [N, 1] sum of exp(logit - top) * logit: for the entropy
    pull: Tensor | None  # [N, H] sum of exp(logit - top) * W: for the gradient of the log-prob
    heat_pull: Tensor | None  # [N, H] sum of exp(logit - top) * logit * W: for the gradient of the entropy

    @classmethod
    def start(cls, hidden: Tensor, gradient: bool, entropy: bool) -> _Walk:
        column = torch.zeros(len(hidden), 1, dtype=torch.float32, device=hidden.device)
        pull = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if gradient else None
        return cls(
            torch.full_like(column, -torch.inf),
            column.clone(),
            column.clone(),
            column.clone() if entropy else None,
            pull,
            torch.zeros_like(pull) if pull is not None and entropy else None,
        )

    def add(self, logits: Tensor, weight: Tensor, first: int, targets: Tensor) -> None:
        """One tile: logits [N, tile] float32 (used up), its weight rows, the id of its first word."""
        place = targets - first
        here = (place >= 0) & (place < len(weight))
        found = logits.gather(1, place.clamp(0, len(weight) - 1)[:, None])
        self.chosen = torch.where(here[:, None], found, self.chosen)
        top = torch.maximum(self.top, logits.amax(dim=1, keepdim=True))
        scale = (self.top - top).exp_()
        self.top = top
        kept = logits.clone() if self.heat is not None else None
        shares = logits.sub_(top).exp_()
        self.mass = self.mass.mul_(scale).add_(shares.sum(dim=1, keepdim=True))
        if self.pull is not None:
            self.pull.mul_(scale).add_((shares.to(weight.dtype) @ weight).float())
        if self.heat is not None and kept is not None:
            warmth = kept.mul_(shares)
            self.heat.mul_(scale).add_(warmth.sum(dim=1, keepdim=True))
            if self.heat_pull is not None:
                self.heat_pull.mul_(scale).add_((warmth.to(weight.dtype) @ weight).float())


def _walk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    walk: _Walk,
    banned: Banned | None,
) -> None:
    """Go over the vocabulary once."""
    for first in range(0, len(weight), TILE_WORDS):
        tile = weight[first : first + TILE_WORDS]
        logits = torch.nn.functional.linear(hidden, tile, None if bias is None else bias[first : first + TILE_WORDS])
        logits = logits.float()
        if temperature != 1.0:
            logits = logits.div_(temperature)
        if banned is not None:
            places, tokens = banned
            inside = tokens[(tokens >= first) & (tokens < first + len(tile))] - first
            if len(inside):
                logits[places.nonzero(), inside] = NEVER
        walk.add(logits, tile, first, targets)


class _ChosenLogprobs(torch.autograd.Function):
    """hidden[N, H] -> (logprobs[N], entropy[N]) float32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        entropy: bool,
        banned: Banned | None,
    ) -> tuple[Tensor, Tensor]:
        gradient = ctx.needs_input_grad[0]
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropies = torch.zeros_like(logprobs)
        slopes = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if gradient else None
        entropy_slopes = torch.empty_like(slopes) if slopes is not None and entropy else None
        for start in range(0, len(hidden), TILE_TOKENS):
            rows = slice(start, min(start + TILE_TOKENS, len(hidden)))
            walk = _Walk.start(hidden[rows], gradient, entropy)
            here = None if banned is None else (banned[0][rows], banned[1])
            _walk(hidden[rows], weight, bias, targets[rows], temperature, walk, here)
            normalizer = walk.top + walk.mass.log()
            logprobs[rows] = (walk.chosen - normalizer).squeeze(1)
            mean_logit = walk.heat / walk.mass if walk.heat is not None else None
            if mean_logit is not None:
                entropies[rows] = (normalizer - mean_logit).squeeze(1)
            if slopes is not None and walk.pull is not None:
                expected = walk.pull / walk.mass
                slopes[rows] = (weight[targets[rows]].float() - expected).div_(temperature)
                if entropy_slopes is not None and walk.heat_pull is not None and mean_logit is not None:
                    entropy_slopes[rows] = (walk.heat_pull / walk.mass - mean_logit * expected).div_(-temperature)
        ctx.save_for_backward(slopes, entropy_slopes)
        ctx.dtype = hidden.dtype
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slopes, entropy_slopes = ctx.saved_tensors
        total = slopes * grads[0][:, None]
        if entropy_slopes is not None:
            total = total + entropy_slopes * grads[1][:, None]
        return total.to(ctx.dtype), None, None, None, None, None, None


def chosen_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    banned: Banned | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target token, and the entropy of each distribution (zeros unless asked for).

    hidden [N, H], weight [V, H] and bias [V] frozen, targets [N] int64 -> logprobs [N], entropy [N], float32, nats.
    The logits are divided by `temperature` and `banned` tokens left out first: what is scored is what was sampled.
    """
    apply: Any = _ChosenLogprobs.apply
    result: tuple[Tensor, Tensor] = apply(hidden, weight, bias, targets, temperature, entropy, banned)
    return result


def logits_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, entropy: bool = False, banned: Banned | None = None
) -> tuple[Tensor, Tensor]:
    """The same from ready logits [N, V], for heads that are more than one matrix (soft caps, scaling)."""
    scaled = logits.float() / temperature
    if banned is not None:
        places, tokens = banned
        scaled[places.nonzero(), tokens] = NEVER
    normalizer = scaled.logsumexp(dim=-1)
    logprobs = scaled.gather(1, targets[:, None]).squeeze(1) - normalizer
    if not entropy:
        return logprobs, torch.zeros_like(logprobs)
    return logprobs, normalizer - (torch.softmax(scaled, dim=-1) * scaled).sum(dim=-1)
