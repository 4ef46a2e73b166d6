"""Scores for single tokens beside scores for whole responses: read, summed, and what they add up to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from marl_core.bank.inputs import plain
from marl_core.errors import MarlError, PluginError
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


def score_list(answer: Any, who: str, error: type[MarlError]) -> list[Any] | None:
    """A reward's answer as a list with a number, a list of numbers or None for each response; None if it is no list.

    A column [B, 1] becomes [B]. `error`, naming `who`, for a tensor without data.
    """
    if isinstance(answer, Tensor) and answer.is_meta:
        raise error(f"{who} gave a tensor without data (device meta); return numbers.")
    if (
        isinstance(answer, str | bytes | Mapping | Set)
        or not hasattr(answer, "__len__")
        or not hasattr(answer, "__iter__")
    ):
        return None
    if getattr(answer, "ndim", 1) == 0:  # a single number as tensor or array
        return [answer.item()]
    values = [plain(value) for value in (answer.detach() if isinstance(answer, Tensor) else answer)]
    column = bool(values) and all(isinstance(value, list) and len(value) == 1 for value in values)
    return [value[0] for value in values] if column else values


def number(value: Any) -> float | None:
    """A number or truth value of any library as a float; None for anything else, None included."""
    if isinstance(value, str | bytes | complex) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
    except OverflowError:
        return math.inf


def allowed(error: type[MarlError]) -> str:
    """What may stand for a score, as a sentence: a plugin's source (its error is a PluginError) may abstain, a caller's scores may not."""
    return f"Give a finite number{', or None to abstain' if issubclass(error, PluginError) else ''}."


def is_per_token(values: Sequence[Any]) -> bool:
    """Whether a reward gave scores for tokens: a list of numbers for some response."""
    return any(isinstance(row, list) for row in values)


def read_token_scores(rows: Sequence[Any], rollout: Rollout, who: str, error: type[MarlError]) -> Tensor:
    """Scores for tokens as a tensor [B, T] float32: 0 under a false mask, a row of NaN where the source abstained.

    `rows`: for each response a list of numbers, one for each of its tokens, or for each position [T] of the rollout, whatever
    stands under a false mask; or None. `error` for any other length, or a token that counts and whose score isn't finite.
    """
    shape = rollout.ids.shape
    result = torch.zeros(shape, dtype=torch.float32)
    rectangular = all(row is None or (isinstance(row, list) and len(row) == shape[1]) for row in rows)
    for i, row in enumerate(rows):
        if row is None:
            result[i] = math.nan
            continue
        keep, length = rollout.mask[i].cpu(), int(rollout.lengths[i])
        if rectangular:
            row = [score for score, counts in zip(row, keep.tolist(), strict=True) if counts]
        if not isinstance(row, list) or len(row) != length:
            what = f"{len(row)} numbers" if isinstance(row, list) else "one number"
            raise error(
                f"{who}: response {i + 1} has {length} tokens and got {what}; give one for each token, or None."
            )
        scores = [number(value) for value in row]
        for position, score in enumerate(scores):
            if score is None or not abs(score) <= torch.finfo(torch.float32).max:
                raise error(
                    f"{who}: token {position + 1} of response {i + 1} got {row[position]!r:.80}, not a finite number; "
                    f"its text begins {rollout.texts[i][:80]!r}. {allowed(error)}"
                )
        result[i, keep] = torch.tensor(scores, dtype=torch.float32)
    return result.to(rollout.ids.device)


def combine(
    source_scores: Mapping[str, Tensor], weights: Mapping[str, float], rollout: Rollout
) -> tuple[Scores, Tensor]:
    """The weighted sum of sources' scores ([B] or [B, T] each), and which responses [B] bool at least one source scored."""
    device = rollout.ids.device
    total = torch.zeros(len(rollout), device=device)
    judged = torch.zeros(len(rollout), dtype=torch.bool, device=device)
    parts: dict[str, Tensor] = {}
    tokens: Tensor | None = None
    for name, scores in source_scores.items():
        parts[name] = scores.sum(dim=1) if scores.dim() == 2 else scores
        if scores.dim() == 2:
            weighted = weights[name] * scores.nan_to_num(0.0)
            tokens = weighted if tokens is None else tokens + weighted
        total = total + weights[name] * parts[name].nan_to_num(0.0)
        judged |= ~parts[name].isnan()
    return Scores(total, parts, tokens), judged
