"""Pay for short answers; compare the answers to a prompt without dividing by their spread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt

from marl_core import Estimator, Strategy, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from marl_core import AdvantageInputs, RewardFunction


class Brevity(Strategy):
    """One point up to `target` tokens, then less in proportion."""

    target: PositiveInt = Field(64, description="Length in tokens that still earns the full point.")

    @hookimpl
    def marl_reward(self) -> RewardFunction:
        """Rollout -> scores [B]."""
        return lambda rollout: (self.target / rollout.mask.sum(dim=1)).clamp(max=1.0)


class DrGRPO(Strategy):
    """A response's score less the mean of those to its prompt: GRPO without the division by their standard deviation.

    A_i = R_i - mean R, "Dr. GRPO", Liu et al. 2025 (arXiv:2503.20783). Prompts whose answers score nearly alike then weigh little.
    """

    @hookimpl
    def marl_advantage(self) -> Estimator:
        """No value function, but several responses to each prompt."""
        return Estimator(_less_the_mean, needs_groups=True)


def _less_the_mean(inputs: AdvantageInputs) -> Tensor:
    """Scores [B], those of one prompt in a row -> advantages [B]."""
    groups = inputs.scores.view(-1, inputs.samples_per_prompt)
    return (groups - groups.mean(dim=1, keepdim=True)).flatten()
