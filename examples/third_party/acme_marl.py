"""Pay for short answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt

from marl_core import Strategy, hookimpl

if TYPE_CHECKING:
    from marl_core import RewardFunction


class Brevity(Strategy):
    """One point up to `target` tokens, then less in proportion."""

    target: PositiveInt = Field(64, description="Length in tokens that still earns the full point.")

    @hookimpl
    def marl_reward(self) -> RewardFunction:
        """Rollout -> scores [B]."""
        return lambda rollout: (self.target / rollout.mask.sum(dim=1)).clamp(max=1.0)
