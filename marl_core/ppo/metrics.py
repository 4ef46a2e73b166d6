"""A step's numbers under the field's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from torch import Tensor

from marl_core.config.ppo_config import KLKind
from marl_core.ppo.objectives import explained_variance, kl_estimate, masked_mean, masked_sum
from marl_core.ppo.types import Advantages, ScoredRollout, StepStats, UpdateStats


def step_stats(
    step: int,
    scored: ScoredRollout,
    advantages: Advantages,
    update: UpdateStats,
    kl_coef: float,
    seconds: Mapping[str, float],
) -> StepStats:
    """All metrics of one step. KL is in nats per response unless the name says otherwise; times are in seconds.

    A reward source that abstained from every response has no mean, and no key.
    """
    mask, rollout = scored.rollout.mask, scored.rollout
    scores = scored.scores
    tokens, total = float(mask.sum()), sum(seconds.values())
    metrics = {
        "objective/scores": float(scores.mean()),
        "objective/scores_std": float(scores.std()) if len(scores) > 1 else 0.0,
        "objective/shaped_scores": float(scored.shaped_scores.mean()),
        "objective/rlhf_reward": float(masked_sum(advantages.rewards, mask, dim=1).mean()),
        "objective/entropy": _mean(scored.entropy, mask),
        "objective/kl_coef": kl_coef,
        **_kl(scored),
        **{
            f"reward/{name}": float(part.nanmean())
            for name, part in scored.parts.items()
            if not bool(part.isnan().all())
        },
        **_update(update),
        **_value(scored, advantages),
        "tokens/mean_length": tokens / len(rollout),
        "tokens/finished": float(rollout.finished.float().mean()),
        "perf/tokens_per_second": tokens / total if total else 0.0,
        "perf/seconds": total,
        **{f"perf/seconds_{phase}": spent for phase, spent in seconds.items()},
    }
    return StepStats(step, {**metrics, **_logged(scored, metrics)})


RESERVED_NAMES = frozenset(("step", "time"))
"""Keys of the run's files that stand beside the metrics."""


def _logged(scored: ScoredRollout, metrics: Mapping[str, float]) -> dict[str, float]:
    """What reward functions logged, under their names; under `logged/` where marl has a number of that name."""
    numbers = {} if scored.logged is None else scored.logged.metrics
    return {
        name if name not in metrics.keys() | RESERVED_NAMES else f"logged/{name}": value
        for name, value in numbers.items()
    }


def _mean(values: Tensor | None, mask: Tensor) -> float:
    return 0.0 if values is None else float(masked_mean(values, mask))


def _kl(scored: ScoredRollout) -> dict[str, float]:
    """k1 summed over the response is the KL in nats; k2 and k3 beside it tell noise from drift."""
    if scored.ref_logprobs is None:
        return {"objective/kl": 0.0}
    mask = scored.rollout.mask
    estimates = {kind: kl_estimate(scored.logprobs, scored.ref_logprobs, kind) for kind in get_args(KLKind)}
    sums = {kind: float(masked_sum(value, mask, dim=1).mean()) for kind, value in estimates.items()}
    return {
        **{"objective/kl" if kind == "k1" else f"objective/kl_{kind}": value for kind, value in sums.items()},
        "objective/kl_per_token": _mean(estimates["k1"], mask),
    }


def _update(update: UpdateStats) -> dict[str, float]:
    return {
        "policy/loss": update.policy_loss,
        "policy/clipfrac": update.clipfrac,
        "policy/approx_kl": update.approx_kl,
        "policy/ratio_mean": update.ratio_mean,
        "policy/ratio_std": update.ratio_std,
        "policy/ratio_min": update.ratio_min,
        "policy/ratio_max": update.ratio_max,
        "policy/first_ratio_error": update.first_ratio_error,
        "policy/grad_norm": update.policy_grad_norm,
        "policy/learning_rate": update.learning_rate,
        "policy/optimizer_steps": update.optimizer_steps,
        "policy/stopped_early": update.stopped_early,
        "val/loss": update.value_loss,
        "val/clipfrac": update.value_clipfrac,
        "val/grad_norm": update.value_grad_norm,
    }


def _value(scored: ScoredRollout, advantages: Advantages) -> dict[str, float]:
    if scored.values is None or advantages.returns is None:
        return {}
    mask = scored.rollout.mask
    return {
        "val/explained_var": float(explained_variance(scored.values, advantages.returns, mask)),
        "val/mean": _mean(scored.values, mask),
        "val/returns_mean": _mean(advantages.returns, mask),
    }
