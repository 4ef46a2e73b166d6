"""What a run must remember beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from marl_core.ppo.shaping import RewardStats


@dataclass(frozen=True, slots=True)
class RunState:
    """Steps done, the KL coefficient, the moments of the scores so far."""

    step: int = 0
    kl_coef: float = 0.0
    reward_stats: RewardStats = field(default_factory=RewardStats)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        stats = self.reward_stats
        moments = {"count": stats.count, "mean": stats.mean, "squares": stats.squares}
        return {"step": self.step, "kl_coef": self.kl_coef, "shaper": moments}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> RunState:
        """What `as_dict` gave; KeyError or TypeError where it is something else."""
        moments = {name: float(saved["shaper"][name]) for name in ("count", "mean", "squares")}
        return cls(int(saved["step"]), float(saved["kl_coef"]), RewardStats(**moments))
