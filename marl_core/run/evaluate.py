"""Held-out evaluation: the policy's reward, KL to the reference, length and judges, with the spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from marl_core.bank.views import View
from marl_core.config.plan import Plan
from marl_core.ppo.objectives import masked_sum
from marl_core.ppo.ranks import ALONE, Ranks
from marl_core.ppo.reward_context import asking, logged, reward_context
from marl_core.ppo.rollout import generate
from marl_core.ppo.scoring import reference_logprobs, score_sources, view_logprobs
from marl_core.ppo.types import Evaluation, Rollout
from marl_core.run.passes import score_budget
from marl_core.run.prompts import PromptData
from marl_core.run.roles import Roles
from marl_core.run.seeds import derive_seed
from marl_core.run.shares import padded_places


def evaluate(
    plan: Plan, roles: Roles, data: PromptData, stops: Sequence[int], step: int, ranks: Ranks = ALONE
) -> Evaluation:
    """One response to each held-out prompt for each seed; the same seeds at every step, so that runs compare."""
    part = plan.config.eval
    count = min(len(data), part.limit or len(data))
    chunk = plan.config.ppo.batch
    per_seed: list[dict[str, float]] = []
    samples: list[dict[str, Any]] = []
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
        said = logged(ranks.everyone({**context.part(), "columns": {}}), [0] * ranks.size).metrics
        per_seed.append(_means(rows) | {f"{LOGGED}{name}": value for name, value in said.items()})
        samples = samples or rows[: part.samples]
    found = {name: [run[name] for run in per_seed if name in run] for run in per_seed for name in run}
    means = {name: statistics.fmean(values) for name, values in found.items()}
    spread = {name: statistics.stdev(values) if len(values) > 1 else 0.0 for name, values in found.items()}
    judges = {name: {"mean": means[f"judge/{name}"], "std": spread[f"judge/{name}"]} for name in part.judges}
    return Evaluation(
        step=step,
        reward=means["reward"],
        reward_std=spread["reward"],
        kl=means["kl"],
        kl_std=spread["kl"],
        length=means["length"],
        length_std=spread["length"],
        finished=means["finished"],
        judges=judges,
        samples=samples,
        logged={
            name.removeprefix(LOGGED): {"mean": means[name], "std": spread[name]}
            for name in means
            if name.startswith(LOGGED)
        },
    )


LOGGED = "logged/"
"""Before the names of what reward functions logged, among an evaluation's numbers."""


def _rows(plan: Plan, roles: Roles, rollout: Rollout, ranks: Ranks) -> list[dict[str, Any]]:
    size, tokens = score_budget(plan.config, roles.bank, ranks)
    temperature = plan.config.sampling.temperature
    total, _ = score_sources(roles.bank, roles.rewards, rollout, size, tokens)
    judged = {j.name: score_sources(roles.bank, [j], rollout, size, tokens)[0] for j in roles.judges}
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
            "judges": {name: float(scores[i]) for name, scores in judged.items()},
        }
        for i in range(len(rollout))
    ]


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    means = {name: statistics.fmean(row[name] for row in rows) for name in ("kl", "length", "finished")}
    means["reward"] = statistics.fmean(row["score"] for row in rows)
    return means | {
        f"judge/{name}": statistics.fmean(row["judges"][name] for row in rows) for name in rows[0]["judges"]
    }
