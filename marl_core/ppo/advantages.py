"""ScoredRollout -> Advantages: the KL penalty, the token rewards and the chosen estimator."""

from __future__ import annotations

import torch

from marl_core.config.run_config import PPOSection
from marl_core.errors import ConfigError
from marl_core.ppo.objectives import (
    generalized_advantage_estimation,
    group_advantages,
    kl_estimate,
    masked_sum,
    masked_whiten,
    rloo_advantages,
    token_rewards,
)
from marl_core.ppo.types import Advantages, ScoredRollout


def estimate_advantages(scored: ScoredRollout, ppo: PPOSection, kl_coef: float | None = None) -> Advantages:
    """Advantages of one rollout; `kl_coef` replaces the configured coefficient when it is adaptive.

    gae: per token, from rewards, values, gamma and lam. rloo, grpo: one number per response, from the score (of scores for
    tokens: their sum) and, with the KL in the reward, the response's summed penalty.
    """
    mask = scored.rollout.mask
    coef = ppo.kl.coef if kl_coef is None else kl_coef
    into_reward = coef if ppo.kl.into == "reward" else 0.0
    kl = torch.zeros_like(scored.logprobs)
    if scored.ref_logprobs is not None:
        kl = kl_estimate(scored.logprobs, scored.ref_logprobs, ppo.kl.estimator).masked_fill(~mask, 0.0)
    rewards = token_rewards(scored.shaped_scores, kl, mask, into_reward, scored.token_scores)
    if ppo.advantage == "gae":
        if scored.values is None:
            raise ConfigError("advantage gae needs values; score with a value function, or use rloo or grpo.")
        advantages, returns = generalized_advantage_estimation(rewards, scored.values, mask, ppo.gamma, ppo.lam)
        return Advantages(kl, rewards, masked_whiten(advantages, mask) if ppo.whiten else advantages, returns)
    totals = masked_sum(rewards, mask, dim=1)
    if len(totals) % ppo.samples_per_prompt:
        raise ConfigError(
            f"advantage {ppo.advantage}: {len(totals)} responses can't be grouped by samples_per_prompt "
            f"{ppo.samples_per_prompt}; give each prompt's responses one after the other, the same number for each."
        )
    estimate = rloo_advantages if ppo.advantage == "rloo" else group_advantages
    per_response = estimate(totals, ppo.samples_per_prompt)
    return Advantages(kl, rewards, per_response[:, None] * mask, None)
