"""Scores for single tokens beside scores for whole responses: read, summed, and what they add up to."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from marl_core.errors import MarlError
from marl_core.ppo.types import Rollout


@dataclass(frozen=True, slots=True)
class Scores:
    """What the reward sources gave, float32: the weighted sum [B] and each source's own scores [B].

    A source's own score is NaN where it abstained; of a source that scores tokens it is their sum. `tokens` [B, T] is
    the part of the weighted sum that lands on single tokens, None when no source scores tokens.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None


def is_per_token(found: object) -> bool:
    """Whether a reward gave scores for tokens: a tensor [B, T], or a list with a list of numbers for a response."""
    if isinstance(found, Tensor):
        return found.dim() == 2
    rows = found if isinstance(found, list | tuple) else ()
    return any(isinstance(row, list | tuple) or getattr(row, "ndim", 0) == 1 for row in rows)


def read_token_scores(found: object, rollout: Rollout, who: str, error: type[MarlError]) -> Tensor:
    """Scores for tokens as a tensor [B, T] float32: 0 under a false mask, a row of NaN where the source abstained.

    `found` is a tensor [B, T], whatever stands under a false mask, or a list with a list of numbers for each response,
    one for each of its tokens, or None. `error` unless it is that and all of it finite.
    """
    shape, device = rollout.ids.shape, rollout.ids.device
    if isinstance(found, Tensor):
        if found.shape != shape or found.dtype == torch.bool:
            raise error(
                f"{who} gave a tensor of {found.dtype} {list(found.shape)}; return numbers, [{shape[0]}] or {list(shape)}."
            )
        result = torch.where(rollout.mask, found.detach().float().to(device), torch.zeros(shape, device=device))
    else:
        result = _from_lists(found, rollout, who, error).to(device)
    given = ~result.isnan().all(dim=1) if not isinstance(found, Tensor) else torch.ones(len(rollout), dtype=torch.bool)
    bad = (~result.isfinite()).any(dim=1).to(given.device) & given
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        place = int((~result[row].isfinite()).nonzero()[0])
        raise error(
            f"{who}: token {place + 1} of response {row + 1} got {result[row, place].item()}, not a finite number; "
            f"its text begins {rollout.texts[row][:80]!r}."
        )
    return result


def _from_lists(found: object, rollout: Rollout, who: str, error: type[MarlError]) -> Tensor:
    rows: list[object] = list(found)  # type: ignore[call-overload]  # a list or tuple: see is_per_token
    if len(rows) != len(rollout):
        raise error(f"{who} gave {len(rows)} rewards for {len(rollout)} responses; return exactly one for each.")
    result = torch.zeros(rollout.ids.shape, dtype=torch.float32)
    for i, row in enumerate(rows):
        if row is None:
            result[i] = math.nan
            continue
        values = list(row) if hasattr(row, "__len__") else None  # type: ignore[call-overload]  # anything with a length
        length = int(rollout.lengths[i])
        if values is None or len(values) != length:
            what = "one number" if values is None else f"{len(values)} numbers"
            raise error(
                f"{who}: response {i + 1} has {length} tokens and got {what}; give one for each token, or None."
            )
        wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, numbers.Real) or not math.isfinite(v)]
        if wrong:
            raise error(f"{who}: a token of response {i + 1} got {wrong[0]!r:.80}, not a finite number.")
        result[i, rollout.mask[i].cpu()] = torch.tensor([float(value) for value in values], dtype=torch.float32)
    return result


def combine(given: Mapping[str, Tensor], weights: Mapping[str, float], rollout: Rollout) -> tuple[Scores, Tensor]:
    """The weighted sum of sources' scores ([B] or [B, T] each), and which responses [B] anybody judged."""
    device = rollout.ids.device
    total = torch.zeros(len(rollout), device=device)
    judged = torch.zeros(len(rollout), dtype=torch.bool, device=device)
    parts: dict[str, Tensor] = {}
    tokens: Tensor | None = None
    for name, scores in given.items():
        parts[name] = scores.sum(dim=1) if scores.dim() == 2 else scores
        if scores.dim() == 2:
            weighted = weights[name] * scores.nan_to_num(0.0)
            tokens = weighted if tokens is None else tokens + weighted
        total = total + weights[name] * parts[name].nan_to_num(0.0)
        judged |= ~parts[name].isnan()
    return Scores(total, parts, tokens), judged
