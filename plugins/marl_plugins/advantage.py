"""Built-in advantage estimators: what a response, or each of its tokens, was worth beside what could be expected."""

from __future__ import annotations

from typing import TYPE_CHECKING

from marl_core import Estimator, Strategy, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from marl_core import AdvantageInputs


class GAE(Strategy):
    """Generalized advantage estimation: each token by itself, against a value function's expectations.

    `ppo.gamma`, `ppo.lam` and `ppo.whiten` are its settings. Schulman et al. 2016 (arXiv:1506.02438).
    """

    @hookimpl
    def marl_advantage(self) -> Estimator:
        """It needs values."""
        return Estimator(_gae, needs_values=True, uses_token_rewards=True)


class RLOO(Strategy):
    """REINFORCE leave-one-out: a response's score less the mean of the others to its prompt. No value function.

    Ahmadian et al. 2024 (arXiv:2402.14740).
    """

    @hookimpl
    def marl_advantage(self) -> Estimator:
        """It compares the responses to one prompt."""
        return Estimator(_rloo, needs_groups=True)


class GRPO(Strategy):
    """A response's score, standardized among those to its prompt. No value function.

    Shao et al. 2024 (arXiv:2402.03300).
    """

    @hookimpl
    def marl_advantage(self) -> Estimator:
        """It compares the responses to one prompt."""
        return Estimator(_grpo, needs_groups=True)


def _gae(inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
    from marl_core.ppo import generalized_advantage_estimation, masked_whiten

    assert inputs.values is not None  # it said that it needs them
    advantages, returns = generalized_advantage_estimation(
        inputs.rewards, inputs.values, inputs.mask, inputs.gamma, inputs.lam
    )
    return masked_whiten(advantages, inputs.mask) if inputs.whiten else advantages, returns


def _rloo(inputs: AdvantageInputs) -> Tensor:
    from marl_core.ppo import rloo_advantages

    return rloo_advantages(inputs.scores, inputs.samples_per_prompt)


def _grpo(inputs: AdvantageInputs) -> Tensor:
    from marl_core.ppo import group_advantages

    return group_advantages(inputs.scores, inputs.samples_per_prompt)
