"""Held-out evaluation: the policy's reward, KL to the reference, length and judges, with the spread over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from marl_core.config.run_config import EvalSection
from marl_core.data.prompts import PromptData
from marl_core.ppo.data_parallel import padded_rows, score_sharded
from marl_core.ppo.objectives import masked_sum
from marl_core.ppo.progress import advance
from marl_core.ppo.reward_context import asking, logged, reward_context
from marl_core.ppo.seeds import derive_seed
from marl_core.ppo.step import Step
from marl_core.ppo.types import Evaluation, Rollout


def evaluate(step: Step, section: EvalSection, data: PromptData, steps_done: int) -> Evaluation:
    """One response to each held-out prompt for each seed; the same seeds at every step, so that runs compare."""
    count, batch = min(len(data), section.limit or len(data)), step.ppo.batch
    per_seed: list[list[dict[str, Any]]] = []
    logged_by_seed: list[Mapping[str, float]] = []
    for seed in range(section.seeds):
        rows: list[dict[str, Any]] = []
        context = reward_context().fresh()
        for start in range(0, count, batch):
            advance(seed * count + start, section.seeds * count)
            end = min(start + batch, count)
            prompts = data.take(padded_rows(step.ranks, start, end))
            rollout = step.sample(prompts, derive_seed("eval", seed, start), samples=1)
            with asking(context):
                numbers = score_sharded(step.ranks, rollout, len(rollout), lambda part: _numbers(step, part))
            rows += _rows(rollout, numbers)[: end - start]
        ranks = step.ranks
        parts = ranks.all_gather_object({**context.part(), "columns": {}})
        logged_by_seed.append(logged(parts, [0] * ranks.size).metrics)
        per_seed.append(rows)
    advance(section.seeds * count, section.seeds * count)
    (reward, reward_std), (kl, kl_std), (length, length_std), (finished, _) = (
        _over_seeds([[row[name] for row in rows] for rows in per_seed])
        for name in ("score", "kl", "length", "finished")
    )
    return Evaluation(
        step=steps_done,
        reward=reward,
        reward_std=reward_std,
        kl=kl,
        kl_std=kl_std,
        length=length,
        length_std=length_std,
        finished=finished,
        judges={name: _judge([[row["judges"][name] for row in rows] for rows in per_seed]) for name in section.judges},
        samples=per_seed[0][: section.samples],
        logged={
            name: dict(
                zip(("mean", "std"), _over_seeds([[run[name]] for run in logged_by_seed if name in run]), strict=True)
            )
            for name in sorted({name for run in logged_by_seed for name in run})
        },
    )


@dataclass(frozen=True, slots=True)
class EvaluationNumbers:
    """Of each response [B]: its score, its KL to the reference in nats, and each judge's score, NaN where it abstained."""

    score: Tensor
    kl: Tensor
    judges: Mapping[str, Tensor]


def _numbers(step: Step, rollout: Rollout) -> EvaluationNumbers:
    """Policy and reference by passes alike, so that their KL is 0 where they are the same."""
    limits, rollout = step.budget.inference, replace(rollout, behavior=None)
    score = step.rewards(rollout).total if step.roles.rewards else rollout.lengths * math.nan
    judges, reference = step.judge(rollout), step.ref_logprobs(rollout, limits)
    kl = torch.zeros_like(score)
    if reference is not None:
        kl = masked_sum(step.policy_output(rollout, limits).logprobs - reference, rollout.mask, dim=1)
    return EvaluationNumbers(score, kl, judges)


def _rows(rollout: Rollout, numbers: EvaluationNumbers) -> list[dict[str, Any]]:
    return [
        {
            "prompt": rollout.prompts.seen(i),
            **({"cut_tokens": cut} if (cut := rollout.prompts.cut_of(i)) else {}),
            "response": rollout.texts[i],
            "score": float(numbers.score[i]),
            "kl": float(numbers.kl[i]),
            "length": int(rollout.lengths[i]),
            "finished": bool(rollout.finished[i]),
            "judges": {
                name: None if scores[i].isnan() else float(scores[i]) for name, scores in numbers.judges.items()
            },
            **({"row": columns} if (columns := rollout.prompts.shown_row(i)) else {}),
        }
        for i in range(len(rollout))
    ]


def _over_seeds(per_seed: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean of the seeds' means, and their standard deviation, 0 for one seed; NaN for what isn't measured."""
    means = [statistics.fmean(values) for values in per_seed]
    if any(map(math.isnan, means)):  # stdev fails on these
        return math.nan, math.nan
    return statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else 0.0


def _judge(per_seed: Sequence[Sequence[float | None]]) -> dict[str, float | None]:
    """Mean and spread over the responses it judged, None when there are none; `judged` is their share."""
    judged = [[value for value in values if value is not None] for values in per_seed]
    mean, std = _over_seeds([values for values in judged if values]) if any(judged) else (None, None)
    return {"mean": mean, "std": std, "judged": sum(map(len, judged)) / sum(map(len, per_seed))}
