"""Held-out evaluation: the policy's reward, KL to the reference, length and judges, with the spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from marl_core.bank.views import View
from marl_core.data.prompts import PromptData
from marl_core.plan.plan import Plan
from marl_core.ppo.data_parallel import padded_places
from marl_core.ppo.objectives import masked_sum
from marl_core.ppo.ranks import ALONE, Ranks
from marl_core.ppo.reward_context import asking, logged, reward_context
from marl_core.ppo.role_scoring import score_budget
from marl_core.ppo.sampling.sampler import generate
from marl_core.ppo.scoring import judge_all, reference_logprobs, score_sources, view_logprobs
from marl_core.ppo.seeds import derive_seed
from marl_core.ppo.types import Evaluation, Rollout
from marl_core.run.roles import Roles


def evaluate(
    plan: Plan, roles: Roles, data: PromptData, stops: Sequence[int], step: int, ranks: Ranks = ALONE
) -> Evaluation:
    """One response to each held-out prompt for each seed; the same seeds at every step, so that runs compare."""
    part = plan.config.eval
    count = min(len(data), part.limit or len(data))
    chunk = plan.config.ppo.batch
    per_seed: list[list[dict[str, Any]]] = []
    said: list[Mapping[str, float]] = []
    for seed in range(part.seeds):
        rows: list[dict[str, Any]] = []
        context = reward_context().fresh()
        for start in range(0, count, chunk):
            end = min(start + chunk, count)
            places = padded_places(ranks, start, end)
            rollout = generate(
                roles.bank,
                roles.trained.policy,
                data.take(places),
                plan.config.sampling,
                stops,
                derive_seed("eval", seed, start),
                speed=plan.config.speed,
                first=ranks.rank * len(places),
                whole=ranks.size * len(places),
            )
            with asking(context):
                mine = _rows(plan, roles, rollout, ranks)
            shared = ranks.everyone(mine)
            rows += [row for part in shared for row in part][: end - start]
        said.append(logged(ranks.everyone({**context.part(), "columns": {}}), [0] * ranks.size).metrics)
        per_seed.append(rows)
    (reward, reward_std), (kl, kl_std), (length, length_std), (finished, _) = (
        _over_seeds([[row[name] for row in rows] for rows in per_seed])
        for name in ("score", "kl", "length", "finished")
    )
    return Evaluation(
        step=step,
        reward=reward,
        reward_std=reward_std,
        kl=kl,
        kl_std=kl_std,
        length=length,
        length_std=length_std,
        finished=finished,
        judges={name: _judge([[row["judges"][name] for row in rows] for rows in per_seed]) for name in part.judges},
        samples=per_seed[0][: part.samples],
        logged={
            name: dict(zip(("mean", "std"), _over_seeds([[run[name]] for run in said if name in run]), strict=True))
            for name in sorted({name for run in said for name in run})
        },
    )


def _rows(plan: Plan, roles: Roles, rollout: Rollout, ranks: Ranks) -> list[dict[str, Any]]:
    size, tokens = score_budget(plan.config, roles.bank)
    temperature = plan.config.sampling.temperature
    total, _ = score_sources(roles.bank, roles.rewards, rollout, size, tokens)
    judged = judge_all(roles.bank, roles.judges, rollout, size, tokens)
    kl = 0.0 * total
    if plan.config.ppo.kl.coef > 0:
        view = View(roles.trained.policy)
        policy = view_logprobs(roles.bank, view, rollout, temperature, size, tokens=tokens).logprobs
        reference = reference_logprobs(
            roles.bank, roles.reference, rollout, temperature, size, roles.reference_origin, tokens
        )
        kl = masked_sum(policy - reference, rollout.mask, dim=1)
    return [
        {
            "prompt": rollout.prompts.texts[i] if rollout.prompts.texts else "",
            "response": rollout.texts[i],
            "score": float(total[i]),
            "kl": float(kl[i]),
            "length": int(rollout.lengths[i]),
            "finished": bool(rollout.finished[i]),
            "judges": {name: None if scores[i].isnan() else float(scores[i]) for name, scores in judged.items()},
        }
        for i in range(len(rollout))
    ]


def _over_seeds(per_seed: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean of the seeds' means, and their standard deviation, 0 for one seed."""
    means = [statistics.fmean(values) for values in per_seed]
    return statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else 0.0


def _judge(per_seed: Sequence[Sequence[float | None]]) -> dict[str, float | None]:
    """Mean and spread over the responses it judged, None when there are none; `judged` is their share."""
    given = [[value for value in values if value is not None] for values in per_seed]
    mean, std = _over_seeds([values for values in given if values]) if any(given) else (None, None)
    return {"mean": mean, "std": std, "judged": sum(map(len, given)) / sum(map(len, per_seed))}
