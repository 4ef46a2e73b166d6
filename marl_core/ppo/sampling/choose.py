"""Choosing the next token, from one uniform number for each row and position: the same whatever the batch's other rows are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from marl_core.config.run_config import SamplingSection
from marl_core.ppo.logprobs import BANNED_LOGIT
from marl_core.ppo.policy_output import PolicyOutput


def scored_logits(logits: Tensor, temperature: float, banned: Sequence[int] = ()) -> Tensor:
    """Logits [B, V] float32 of the scored distribution: divided by the temperature, `banned` tokens left out."""
    scaled = logits.float()
    if temperature != 1.0:
        scaled = scaled / temperature
    if banned:
        scaled[:, list(banned)] = BANNED_LOGIT
    return scaled


def choose(logits: Tensor, uniform: Tensor, sampling: SamplingSection) -> tuple[Tensor, PolicyOutput]:
    """Draw from softmax(logits), cut to top_k and top_p if asked: the token where the cumulated probability passes `uniform`.

    logits [B, V] float32 as `scored_logits` gives them, uniform [B] float64 in [0, 1) -> tokens [B] int64, and their log-probs
    and entropies [B], of the whole distribution, before any cut.
    """
    normalizer = logits.logsumexp(dim=-1, keepdim=True)
    probs = (logits - normalizer).exp_()
    entropy = normalizer.squeeze(1) - (probs * logits).sum(dim=-1)
    drawn = probs if sampling.top_k == 0 and sampling.top_p == 1.0 else _cut(logits, sampling)
    cumulated = drawn.cumsum(dim=-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulated, target, right=True)
    return tokens.squeeze(1), PolicyOutput((logits.gather(1, tokens) - normalizer).squeeze(1), entropy)


def _cut(logits: Tensor, sampling: SamplingSection) -> Tensor:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    ids: Any = torch.empty(len(logits), 0, dtype=torch.int64)
    if sampling.top_k:
        logits = TopKLogitsWarper(sampling.top_k)(ids, logits)
    if sampling.top_p < 1.0:
        logits = TopPLogitsWarper(sampling.top_p)(ids, logits)
    return logits.softmax(dim=-1)
