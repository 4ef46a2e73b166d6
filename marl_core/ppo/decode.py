"""Sampling token by token with a cache: finished rows leave the batch, samples of one prompt share its prefill.

What is drawn and what is scored are one distribution. Log-probs, entropies and values are by-products of the pass that
draws; in float32 they are exact enough to stand for a scoring pass (`Captured`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.cache import new_cache
from marl_core.bank.heads import apply_head
from marl_core.config.run_config import SamplingPart
from marl_core.ppo.sampling import choose, scored_logits
from marl_core.ppo.types import Captured, Prompts

LEAVING = 16
"""Finished rows leave once they are more than one in this many: moving the cache costs, computing them in vain too."""


@dataclass(slots=True)
class Decoded:
    """Response tokens [B, T] int64, their mask, which rows met a stop token, and the numbers seen on the way."""

    ids: Tensor
    mask: Tensor
    finished: Tensor
    captured: Captured


def decode(
    bank: AdapterBank,
    prompts: Prompts,
    sampling: SamplingPart,
    stops: Sequence[int],
    uniforms: Tensor,
    *,
    limits: Tensor | None = None,
    samples: int = 1,
    value_head: str | None = None,
) -> Decoded:
    """Sample through the active adapter; prompts come `samples` times in a row each.

    uniforms [B, T] float64; limits [B]: most tokens of each row.
    """
    device, (count, most) = bank.device, uniforms.shape
    found = _empty(count, most, device, value_head is not None)
    most_each = torch.full((count,), most) if limits is None else limits.clamp(max=most).cpu()
    stop = torch.tensor(list(stops), device=device)
    once = prompts.mask[::samples]
    cache = new_cache(bank.base.config, once.shape[1] + most)
    hidden = bank.trunk.extend(prompts.ids[::samples], once, cache)[:, -1]
    if samples > 1:
        cache.batch_repeat_interleave(samples)
        hidden = hidden.repeat_interleave(samples, dim=0)
    seen = prompts.mask
    rows, going = torch.arange(count, device=device), torch.ones(count, dtype=torch.bool, device=device)
    for place in range(most):
        never = stops if place < sampling.min_new_tokens else ()
        chosen = choose(
            scored_logits(bank.trunk.logits_of(hidden), sampling.temperature, never), uniforms[rows, place], sampling
        )
        _keep(found, rows, going, place, chosen.tokens)
        found.captured.logprobs[rows, place] = chosen.logprobs
        found.captured.entropy[rows, place] = chosen.entropy
        if value_head is not None and found.captured.values is not None:
            found.captured.values[rows, place] = apply_head(bank.heads[value_head], hidden)
        stopped = torch.isin(chosen.tokens, stop)
        found.finished[rows] |= stopped & going
        going = going & ~stopped & (place + 1 < most_each.to(device)[rows])
        left = int(going.sum())
        if left == 0 or place + 1 == most:
            break
        tokens, gone = chosen.tokens, len(rows) - left
        if gone * LEAVING >= len(rows):
            stay = going.nonzero().squeeze(1)
            cache.batch_select_indices(stay)
            rows, going, tokens, seen = rows[stay], going[stay], tokens[stay], seen[stay]
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
        hidden = bank.trunk.extend(tokens[:, None], seen, cache)[:, -1]
    return _trimmed(found)


def _empty(count: int, most: int, device: torch.device, values: bool) -> Decoded:
    zeros = torch.zeros(count, most, dtype=torch.float32, device=device)
    captured = Captured(zeros, zeros.clone(), zeros.clone() if values else None)
    return Decoded(
        torch.zeros(count, most, dtype=torch.int64, device=device),
        torch.zeros(count, most, dtype=torch.bool, device=device),
        torch.zeros(count, dtype=torch.bool, device=device),
        captured,
    )


def _keep(found: Decoded, rows: Tensor, going: Tensor, place: int, tokens: Tensor) -> None:
    found.ids[rows, place] = torch.where(going, tokens, torch.zeros_like(tokens))
    found.mask[rows, place] = going


def _trimmed(found: Decoded) -> Decoded:
    """Without the places that no row reached, and zero under the mask."""
    width = int(found.mask.any(dim=0).sum())
    mask = found.mask[:, :width]
    cut = [None if t is None else (t[:, :width] * mask) for t in (found.captured.logprobs, found.captured.entropy, found.captured.values)]
    assert cut[0] is not None and cut[1] is not None
    return Decoded(found.ids[:, :width].contiguous(), mask.contiguous(), found.finished, Captured(cut[0], cut[1], cut[2]))
