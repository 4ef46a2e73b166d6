"""The mathematics of PPO as pure functions of tensors.

Masks are boolean and mean "this token counts"; whatever stands under a false mask, NaN included, changes nothing.

Letters, in docstrings and, where it helps, at the end of a tensor's name:

    B  responses                    logprobs, ref_logprobs, kl, rewards, values, advantages, returns, mask  [B, T]
    T  response tokens              scores  [B], one for each response
    G  prompts, each with K of      scores_GK  the same, a row for each prompt
    K  the responses                reward_B, value_B, delta_B  one column of [B, T]
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from marl_core.config.ppo_config import KLKind


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum over the tokens that count.

    values [B, T], mask [B, T] bool -> a scalar, or [B] with `dim` 1; in the dtype of the values.
    """
    counted = torch.where(mask, values, torch.zeros_like(values))
    return counted.sum() if dim is None else counted.sum(dim=dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over the tokens that count; 0 where none does.

    values [B, T], mask [B, T] bool -> a scalar, or [B] with `dim` 1; in the dtype of the values.
    """
    count = mask.sum() if dim is None else mask.sum(dim=dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Variance over the tokens that count, with Bessel's correction; 0 for fewer than two tokens.

    values [B, T], mask [B, T] bool -> a scalar, in the dtype of the values.
    """
    centred = torch.where(mask, values - masked_mean(values, mask), torch.zeros_like(values))
    return centred.square().sum() / (mask.sum() - 1).clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Scale to mean 0 and variance 1 over the tokens that count; masked places become 0.

    values [B, T], mask [B, T] bool -> [B, T]. One token, or equal values, give 0, never NaN. Detail 7 of "The 37 Implementation
    Details of PPO" (2022), over a whole batch, as Ziegler et al. 2019 (arXiv:1909.08593) do in their code.
    """
    whitened = (values - masked_mean(values, mask)) * torch.rsqrt(masked_var(values, mask) + eps)
    return torch.where(mask, whitened, torch.zeros_like(values))


def aggregate(
    values: Tensor, mask: Tensor, how: Literal["token", "sequence"] = "token", total: Tensor | float | None = None
) -> Tensor:
    """One loss from per-token losses [B, T], mask [B, T] bool -> a scalar.

    `token`: sum over tokens / number of tokens, as in Ziegler et al. 2019; Yu et al. 2025 (arXiv:2503.14476), section 3.3.
    `sequence`: sum over responses of their token means / number of responses, as in Shao et al. 2024 (arXiv:2402.03300), eq. 3.
    `total` replaces the divisor, so that microbatches of one minibatch add up to the minibatch's mean.
    """
    if how == "token":
        return masked_sum(values, mask) / (mask.sum().clamp(min=1) if total is None else total)
    return masked_mean(values, mask, dim=1).sum() / (len(values) if total is None else total)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference) in nats, from tokens sampled by the policy; [B, T] -> [B, T].

    With log r = ref_logprobs - logprobs:  k1 = -log r,  k2 = (log r)^2 / 2,  k3 = r - 1 - log r.
    Schulman, "Approximating KL Divergence" (2020). k1 and k3 are unbiased, k2 and k3 are never negative.
    """
    log_ratio = ref_logprobs - logprobs
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coef: float, token_scores: Tensor | None = None) -> Tensor:
    """Per-token rewards: r_t = -coef * kl_t + s_t, plus what remains of the score, S - sum_t s_t, on the last token that counts.

    Without `token_scores` s_t is 0 and this is Ziegler et al. 2019 (arXiv:1909.08593), eq. 2; scores for steps on the way
    are process rewards, Uesato et al. 2022 (arXiv:2211.14275). scores S [B], kl, mask and token_scores [B, T] -> [B, T];
    masked places are 0.
    """
    rewards = torch.where(mask, -coef * kl, torch.zeros_like(kl))
    if token_scores is not None:
        counted = torch.where(mask, token_scores, torch.zeros_like(token_scores)).to(rewards.dtype)
        rewards, scores = rewards + counted, scores - counted.sum(dim=1)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)
    return rewards.scatter_add(1, last[:, None], scores.to(rewards.dtype)[:, None])


def generalized_advantage_estimation(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, T] from rewards and values [B, T], mask [B, T] bool; V is 0 after the last token that counts.

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  return_t = A_t + V_t.
    Schulman et al. 2016 (arXiv:1506.02438), eq. 16. Masked places are skipped over and become 0.
    """
    rewards = torch.where(mask, rewards, torch.zeros_like(rewards))
    values = torch.where(mask, values, torch.zeros_like(values))
    advantages = torch.zeros_like(values)
    next_advantage_B = torch.zeros_like(values[:, 0])
    next_value_B = torch.zeros_like(next_advantage_B)
    for t in reversed(range(values.shape[1])):
        reward_B, value_B, counts_B = rewards[:, t], values[:, t], mask[:, t]
        delta_B = reward_B + gamma * next_value_B - value_B
        advantage_B = delta_B + gamma * lam * next_advantage_B
        next_advantage_B = torch.where(counts_B, advantage_B, next_advantage_B)
        next_value_B = torch.where(counts_B, value_B, next_value_B)
        advantages[:, t] = torch.where(counts_B, advantage_B, torch.zeros_like(advantage_B))
    return advantages, torch.where(mask, advantages + values, torch.zeros_like(values))


def rloo_advantages(scores: Tensor, group: int) -> Tensor:
    """Score minus the mean of the other responses to the same prompt, [B] -> [B].

    A_i = R_i - (sum_{j != i} R_j) / (k - 1). Ahmadian et al. 2024 (arXiv:2402.14740), eq. 8. Groups of `group`
    consecutive responses share a prompt.
    """
    scores_GK = scores.view(-1, group)
    others_GK = (scores_GK.sum(dim=1, keepdim=True) - scores_GK) / (group - 1)
    return (scores_GK - others_GK).flatten()


def group_advantages(scores: Tensor, group: int, eps: float = 1e-4) -> Tensor:
    """Score standardized within its group, [B] -> [B]: A_i = (R_i - mean R) / (std R + eps).

    Shao et al. 2024 (arXiv:2402.03300), section 4.1.2. A group of equal scores gets 0.
    """
    scores_GK = scores.view(-1, group)
    centred_GK = scores_GK - scores_GK.mean(dim=1, keepdim=True)
    return (centred_GK / (scores_GK.std(dim=1, keepdim=True) + eps)).flatten()


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate loss of each token.

    logprobs, old_logprobs, advantages [B, T], mask [B, T] bool -> losses [B, T], and which tokens were clipped [B, T] bool.
    L_t = -min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t), rho_t = exp(logprobs - old_logprobs).
    Schulman et al. 2017 (arXiv:1707.06347), eq. 7. `dual_clip` c bounds L_t by -c A_t where A_t < 0,
    Ye et al. 2020 (arXiv:1912.09729), eq. 5. Masked places are 0.
    """
    zero = torch.zeros_like(logprobs)
    ratio = torch.exp(torch.where(mask, logprobs - old_logprobs, zero))
    advantages = torch.where(mask, advantages, zero)
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    losses = torch.maximum(unclipped, clipped)
    is_clipped = (clipped > unclipped) & mask
    if dual_clip is not None:
        bound = -dual_clip * advantages
        bounded = (advantages < 0) & (losses > bound)
        losses = torch.where(bounded, bound, losses)
        is_clipped = is_clipped | (bounded & mask)
    return losses, is_clipped


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None = 0.2
) -> tuple[Tensor, Tensor]:
    """Clipped squared error of each token's value.

    values, old_values, returns [B, T], mask [B, T] bool -> losses [B, T], and which tokens were clipped [B, T] bool.
    L_t = max((V_t - R_t)^2, (clip(V_t, Vold_t - clip, Vold_t + clip) - R_t)^2) / 2, as in OpenAI's baselines;
    detail 9 of "The 37 Implementation Details of PPO" (2022). Masked places are 0.
    """
    zero = torch.zeros_like(values)
    error = torch.where(mask, values - returns, zero).square()
    if clip is None:
        return error / 2, torch.zeros_like(mask)
    near = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    clipped_error = torch.where(mask, near - returns, zero).square()
    return torch.maximum(error, clipped_error) / 2, (clipped_error > error) & mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the tokens that count; 0 when the returns don't vary.

    values, returns [B, T], mask [B, T] bool -> a scalar, at most 1. As in OpenAI's baselines (common/math_util.py).
    """
    total_variance = masked_var(torch.where(mask, returns, torch.zeros_like(returns)), mask)
    residual_variance = masked_var(torch.where(mask, returns - values, torch.zeros_like(returns)), mask)
    explained = 1 - residual_variance / total_variance.clamp(min=1e-12)
    return torch.where(total_variance > 0, explained, torch.zeros_like(explained))


def adapt_kl_coef(coef: float, kl_nats: float, target: float, horizon: float, responses: int) -> float:
    """Proportional controller of the KL coefficient: coef * (1 + clip(kl / target - 1, -0.2, 0.2) * responses / horizon).

    KL and target in nats per response, horizon in responses. Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.
    """
    error = min(max(kl_nats / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * responses / horizon)
