"""What the reward sources and judges say of a rollout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.views import ScoreView
from marl_core.errors import DataError, MarlError, NumericError, PluginError
from marl_core.ppo.budget import PassLimits
from marl_core.ppo.plugin_calls import call, describe
from marl_core.ppo.progress import advance, phase
from marl_core.ppo.roles import RewardSource
from marl_core.ppo.scoring import pieces
from marl_core.ppo.token_scores import Scores, allowed, combine, is_per_token, number, read_token_scores, score_list
from marl_core.ppo.types import Rollout

MAX_SCORE = torch.finfo(torch.float32).max
"""Scores are kept in float32: beyond this a Python float or int would become infinite."""


def score_all(bank: AdapterBank, sources: Sequence[RewardSource], rollout: Rollout, limits: PassLimits) -> Scores:
    """All sources' scores and their weighted sum; PluginError when no source scored a response, or one gave no usable scores."""
    source_scores = {source.name: _score(bank, source, rollout, limits) for source in sources}
    scores, judged = combine(source_scores, {source.name: source.weight for source in sources}, rollout)
    if not bool(judged.all()):
        row = int((~judged).nonzero()[0])
        names = ", ".join(source.name for source in sources)
        raise PluginError(
            f"reward: no source ({names}) gave response {row + 1} a score; its text begins {rollout.texts[row][:80]!r}."
        )
    return scores


def judge_all(
    bank: AdapterBank, judges: Sequence[RewardSource], rollout: Rollout, limits: PassLimits
) -> dict[str, Tensor]:
    """Each judge's scores [B] times its weight, NaN where it abstained: it may from all, since nothing is trained on them."""
    judge_scores = {judge.name: _score(bank, judge, rollout, limits) for judge in judges}
    scores, _ = combine(judge_scores, {judge.name: judge.weight for judge in judges}, rollout)
    return {judge.name: judge.weight * scores.parts[judge.name] for judge in judges}


def own_scores(answer: object, rollout: Rollout) -> Scores:
    """A caller's own scores, [B] or [B, T]; DataError unless there is a number for each response."""
    scores, judged = combine({"own": as_scores(answer, rollout, "scores", DataError)}, {"own": 1.0}, rollout)
    if not bool(judged.all()):
        raise DataError("scores: None isn't allowed; give a number for each response.")
    return Scores(scores.total, {}, scores.tokens)


def _score(bank: AdapterBank, source: RewardSource, rollout: Rollout, limits: PassLimits) -> Tensor:
    with phase(f"{source.role} {source.name}"):
        return _scored(bank, source, rollout, limits)


def _scored(bank: AdapterBank, source: RewardSource, rollout: Rollout, limits: PassLimits) -> Tensor:
    who = source.who
    advance(0, len(rollout))
    if isinstance(source.score, ScoreView):
        view = source.score
        scores = torch.cat(
            [
                bank.score(view, piece.sequence_ids, piece.sequence_mask, limits.options)
                for piece in pieces(rollout, limits)
            ]
        )
        if not bool(scores.isfinite().all()):
            row = int((~scores.isfinite()).nonzero()[0])
            raise NumericError(
                f"{who}: response {row + 1} got {scores[row].item()}; its text begins {rollout.texts[row][:80]!r}."
            )
        return scores
    return as_scores(call(source.score, rollout, who), rollout, who)


def as_scores(answer: object, rollout: Rollout, who: str, error: type[MarlError] = PluginError) -> Tensor:
    """What a reward function gave, as a tensor [B], or [B, T] when it scored tokens; None becomes NaN (it abstains).

    Accepted is what `torch.tensor(list, dtype=torch.float32)` takes: numbers and booleans of Python, numpy and torch, in a list,
    tensor, array or column of a table; [B, 1], as a classifier's logits come, is [B]. `error` for anything else.
    """
    count = len(rollout)
    values = score_list(answer, who, error)
    if answer is None:
        raise error(f"{who} returned None; return a list of {count} numbers, one for each response.")
    if values is None:
        raise error(f"{who} gave {describe(answer)}; return a list of {count} numbers, one for each response.")
    if len(values) != count:
        raise error(f"{who} gave {len(values)} rewards for {count} responses; return exactly one for each.")
    if is_per_token(values):
        return read_token_scores(values, rollout, who, error)
    scores = [number(value) for value in values]
    for row, score in enumerate(scores):
        if values[row] is not None and not (score is not None and abs(score) <= MAX_SCORE):  # NaN fails too
            raise error(
                f"{who}: response {row + 1} got {values[row]!r:.80}, not a finite number; its text begins "
                f"{rollout.texts[row][:80]!r}. {allowed(error)}"
            )
    numbers_only = [math.nan if score is None else score for score in scores]
    return torch.tensor(numbers_only, dtype=torch.float32, device=rollout.ids.device)
