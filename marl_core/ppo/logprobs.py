"""Log-probs of chosen tokens under a frozen LM head, without ever holding [tokens, vocabulary].

The head is applied to a chunk of tokens at a time. Because it is frozen, the gradient with respect to the hidden
state is known in the forward chunk: d log p(x) / dh = (W_x - sum_v p_v W_v) / temperature. Backward is then one
multiplication and stores [tokens, hidden] instead of [tokens, vocabulary].
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**23  # float32 logits held at once: 32 MiB
NEVER = -1e9  # logit of a token that could not be sampled: probability 0, and no NaN in the entropy

Banned: TypeAlias = tuple[Tensor, Tensor]
"""Where which tokens could not be sampled: places [N] bool, token ids [S] int64."""


def _ban(logits: Tensor, banned: Banned | None, rows: slice) -> Tensor:
    if banned is not None:
        places, tokens = banned
        logits[places[rows].nonzero(), tokens] = NEVER
    return logits


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
        wants_grad = ctx.needs_input_grad[0]
        count = len(hidden)
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        entropies = torch.zeros_like(logprobs)
        slopes = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if wants_grad else None
        entropy_slopes = torch.empty_like(slopes) if slopes is not None and entropy else None
        step = max(1, CHUNK_ELEMENTS // len(weight))
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            logits = torch.nn.functional.linear(hidden[rows], weight, bias).float().div_(temperature)
            logits = _ban(logits, banned, rows)
            normalizer = logits.logsumexp(dim=-1, keepdim=True)
            logprobs[rows] = (logits.gather(1, targets[rows, None]) - normalizer).squeeze(1)
            if not (entropy or wants_grad):
                continue
            probs = (logits - normalizer).exp_()
            mean_logit = (probs * logits).sum(dim=-1, keepdim=True) if entropy else None
            if mean_logit is not None:
                entropies[rows] = (normalizer - mean_logit).squeeze(1)
            if slopes is not None:
                expected = (probs.to(weight.dtype) @ weight).float()
                slopes[rows] = (weight[targets[rows]].float() - expected).div_(temperature)
            if entropy_slopes is not None and mean_logit is not None:
                weighted = probs.mul_(logits.sub_(mean_logit)).to(weight.dtype)
                entropy_slopes[rows] = (weighted @ weight).float().div_(-temperature)
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
    scaled = _ban(logits.float() / temperature, banned, slice(None))
    normalizer = scaled.logsumexp(dim=-1)
    logprobs = scaled.gather(1, targets[:, None]).squeeze(1) - normalizer
    if not entropy:
        return logprobs, torch.zeros_like(logprobs)
    return logprobs, normalizer - (torch.softmax(scaled, dim=-1) * scaled).sum(dim=-1)
