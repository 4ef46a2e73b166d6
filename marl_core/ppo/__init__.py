"""The algorithm: data of a step, the mathematics, rollout, scoring, update."""

from marl_core.ppo.estimators import estimate_advantages
from marl_core.ppo.objectives import (
    adapt_kl_coef,
    aggregate,
    explained_variance,
    generalized_advantage_estimation,
    group_advantages,
    kl_estimate,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    policy_loss,
    rloo_advantages,
    token_rewards,
    value_loss,
)

__all__ = [
    "adapt_kl_coef",
    "aggregate",
    "estimate_advantages",
    "explained_variance",
    "generalized_advantage_estimation",
    "group_advantages",
    "kl_estimate",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "policy_loss",
    "rloo_advantages",
    "token_rewards",
    "value_loss",
]
