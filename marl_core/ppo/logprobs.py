"""Log-probs of chosen tokens under a frozen LM head, without ever holding [tokens, vocabulary].

The vocabulary is walked in tiles with a running maximum and sum (as in online softmax, Milakov & Gimelshein 2018), so
each tile of the head's weight is read once and its logits stay in the processor's cache. Because the head is frozen,
the gradient with respect to the hidden state is known in the same walk: d log p(x) / dh = (W_x - sum_v p_v W_v) / tau.
Backward is then one multiplication and stores [tokens, hidden] instead of [tokens, vocabulary].

Where a tensor's name ends in capital letters, they are its shape:

    N  tokens whose log-prob is asked for          hidden_NH   what the head reads, in the base's dtype
    H  hidden size                                 weight_VH   the head's weight, weight_KH one tile of it
    V  vocabulary                                  logits_NK   of one tile, float32, divided by the temperature
    K  rows of the weight in one tile              targets_N   ids of the chosen tokens, int64
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from marl_core.config.speed_config import TILE_TOKENS, TILE_VOCABULARY

BANNED_LOGIT = -1e9  # of a token that could not be sampled: probability 0, and no NaN in the entropy

Banned: TypeAlias = tuple[Tensor, Tensor]
"""Where which tokens could not be sampled: rows [N] bool, token ids [S] int64."""


@dataclass(slots=True)
class _Walk:
    """Running sums of one pass over the vocabulary, all relative to the running maximum logit of each token; float32."""

    max_logit: Tensor  # [N, 1]
    sum_exp: Tensor  # [N, 1] sum of exp(logit - max_logit)
    target_logit: Tensor  # [N, 1]
    sum_exp_logit: Tensor | None  # [N, 1] sum of exp(logit - max_logit) * logit: for the entropy
    sum_exp_weight: Tensor | None  # [N, H] sum of exp(logit - max_logit) * W: for the gradient of the log-prob
    sum_exp_logit_weight: (
        Tensor | None
    )  # [N, H] sum of exp(logit - max_logit) * logit * W: for the gradient of the entropy

    @classmethod
    def start(cls, hidden_NH: Tensor, gradient: bool, entropy: bool) -> _Walk:
        zeros_N1 = torch.zeros(len(hidden_NH), 1, dtype=torch.float32, device=hidden_NH.device)
        zeros_NH = torch.zeros(hidden_NH.shape, dtype=torch.float32, device=hidden_NH.device) if gradient else None
        return cls(
            max_logit=torch.full_like(zeros_N1, -torch.inf),
            sum_exp=zeros_N1.clone(),
            target_logit=zeros_N1.clone(),
            sum_exp_logit=zeros_N1.clone() if entropy else None,
            sum_exp_weight=zeros_NH,
            sum_exp_logit_weight=torch.zeros_like(zeros_NH) if zeros_NH is not None and entropy else None,
        )

    def add(self, logits_NK: Tensor, weight_KH: Tensor, first: int, targets_N: Tensor) -> None:
        """One tile: its logits (used up), its rows of the weight, the id of its first token."""
        column_N = targets_N - first
        inside_N = (column_N >= 0) & (column_N < len(weight_KH))
        candidate_N1 = logits_NK.gather(1, column_N.clamp(0, len(weight_KH) - 1)[:, None])
        self.target_logit = torch.where(inside_N[:, None], candidate_N1, self.target_logit)
        max_logit = torch.maximum(self.max_logit, logits_NK.amax(dim=1, keepdim=True))
        scale_N1 = (self.max_logit - max_logit).exp_()
        self.max_logit = max_logit
        copy_NK = logits_NK.clone() if self.sum_exp_logit is not None else None
        exp_NK = logits_NK.sub_(max_logit).exp_()
        self.sum_exp = self.sum_exp.mul_(scale_N1).add_(exp_NK.sum(dim=1, keepdim=True))
        if self.sum_exp_weight is not None:
            self.sum_exp_weight.mul_(scale_N1).add_((exp_NK.to(weight_KH.dtype) @ weight_KH).float())
        if self.sum_exp_logit is not None and copy_NK is not None:
            exp_logit_NK = copy_NK.mul_(exp_NK)
            self.sum_exp_logit.mul_(scale_N1).add_(exp_logit_NK.sum(dim=1, keepdim=True))
            if self.sum_exp_logit_weight is not None:
                product_NH = (exp_logit_NK.to(weight_KH.dtype) @ weight_KH).float()
                self.sum_exp_logit_weight.mul_(scale_N1).add_(product_NH)


def _walk_vocabulary(
    walk: _Walk,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    temperature: float,
    banned: Banned | None,
) -> None:
    """Go over the vocabulary once, tile by tile."""
    for first in range(0, len(weight_VH), TILE_VOCABULARY):
        tile = slice(first, first + TILE_VOCABULARY)
        weight_KH = weight_VH[tile]
        logits_NK = torch.nn.functional.linear(hidden_NH, weight_KH, None if bias_V is None else bias_V[tile]).float()
        if temperature != 1.0:
            logits_NK = logits_NK.div_(temperature)
        if banned is not None:
            rows_N, tokens = banned
            columns = tokens[(tokens >= first) & (tokens < first + len(weight_KH))] - first
            if len(columns):
                logits_NK[rows_N.nonzero(), columns] = BANNED_LOGIT
        walk.add(logits_NK, weight_KH, first, targets_N)


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
        slope_NH = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if gradient else None
        entropy_slope_NH = torch.empty_like(slope_NH) if slope_NH is not None and entropy else None
        for start in range(0, len(hidden), TILE_TOKENS):
            rows = slice(start, min(start + TILE_TOKENS, len(hidden)))
            walk = _Walk.start(hidden[rows], gradient, entropy)
            tile_banned = None if banned is None else (banned[0][rows], banned[1])
            _walk_vocabulary(walk, hidden[rows], weight, bias, targets[rows], temperature, tile_banned)
            log_normalizer = walk.max_logit + walk.sum_exp.log()
            logprobs[rows] = (walk.target_logit - log_normalizer).squeeze(1)
            mean_logit = walk.sum_exp_logit / walk.sum_exp if walk.sum_exp_logit is not None else None
            if mean_logit is not None:
                entropies[rows] = (log_normalizer - mean_logit).squeeze(1)
            if slope_NH is not None and walk.sum_exp_weight is not None:
                mean_weight = walk.sum_exp_weight / walk.sum_exp
                slope_NH[rows] = (weight[targets[rows]].float() - mean_weight).div_(temperature)
                if entropy_slope_NH is not None and walk.sum_exp_logit_weight is not None and mean_logit is not None:
                    mean_logit_weight = walk.sum_exp_logit_weight / walk.sum_exp
                    entropy_slope_NH[rows] = (mean_logit_weight - mean_logit * mean_weight).div_(-temperature)
        ctx.save_for_backward(slope_NH, entropy_slope_NH)
        ctx.dtype = hidden.dtype
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope_NH, entropy_slope_NH = ctx.saved_tensors
        total_NH = slope_NH * grads[0][:, None]
        if entropy_slope_NH is not None:
            total_NH = total_NH + entropy_slope_NH * grads[1][:, None]
        return total_NH.to(ctx.dtype), None, None, None, None, None, None


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
    """The same from ready logits [N, V] of any dtype, for heads that are more than one matrix (soft caps, scaling).

    targets [N] int64 -> logprobs [N], entropy [N], float32, nats.
    """
    scaled = logits.float() / temperature
    if banned is not None:
        rows, tokens = banned
        scaled[rows.nonzero(), tokens] = BANNED_LOGIT
    log_normalizer = scaled.logsumexp(dim=-1)
    logprobs = scaled.gather(1, targets[:, None]).squeeze(1) - log_normalizer
    if not entropy:
        return logprobs, torch.zeros_like(logprobs)
    return logprobs, log_normalizer - (torch.softmax(scaled, dim=-1) * scaled).sum(dim=-1)
