"""Who is who on the shared base: what learns, the reference, the sources of reward, the judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.views import ScoreView, View
from marl_core.ppo.types import Rollout

ReferenceFunction: TypeAlias = "Callable[[Rollout], Tensor]"
"""A reference whose weights live elsewhere: Rollout -> log-probs [B, T] float32 of the response tokens."""

RewardFunction: TypeAlias = "Callable[[Rollout], Tensor | Sequence[float | None] | Sequence[Sequence[float] | None]]"
"""A reward: Rollout -> scores [B], or for tokens [B, T] (a list: one number for each token of a response); None abstains."""


@dataclass(frozen=True, slots=True)
class TrainableRoles:
    """The roles that learn: the policy adapter, the value head, and the value's own adapter if it has one."""

    policy: str
    value_head: str | None
    value_adapter: str | None
    value_bank: AdapterBank | None = None
    """The bank that holds the value's own adapter and its head, where that isn't the policy's."""

    def value_home(self, bank: AdapterBank) -> AdapterBank:
        """Where the value's adapter and head are, `bank` being the policy's."""
        return bank if self.value_bank is None else self.value_bank

    @property
    def value_on_policy(self) -> bool:
        """Whether policy and value share one forward."""
        return self.value_head is not None and self.value_adapter is None

    @property
    def policy_head(self) -> str | None:
        """The value head that reads the policy's own forward; None where there is none, or it has an adapter of its own."""
        return self.value_head if self.value_on_policy else None

    def parameters(self, bank: AdapterBank) -> dict[str, dict[str, nn.Parameter]]:
        """Explicit parameters by role: never "all that require grad"."""
        roles = {"policy": bank.parameters(self.policy)}
        if self.value_head is not None:
            home = self.value_home(bank)
            own = home.parameters(self.value_adapter) if self.value_adapter else {}
            roles["value"] = {**own, **home.parameters(self.value_head)}
        return roles


@dataclass(frozen=True, slots=True)
class RewardSource:
    """One reward source or judge: its name in metrics, its weight, what gives the scores, and whose it is."""

    name: str
    weight: float
    score: ScoreView | RewardFunction
    origin: str = ""
    role: str = "reward"
    """What errors call it: `reward`, or `judge` for one that is measured and never trained on."""

    @property
    def who(self) -> str:
        """Its role, name and origin, as errors name it."""
        return f"{self.role} {self.name!r}" + (f" ({self.origin})" if self.origin else "")


@dataclass(frozen=True, slots=True)
class Roles:
    """The roles of one run on a bank."""

    trained: TrainableRoles
    reference: View | ReferenceFunction
    reference_origin: str
    rewards: tuple[RewardSource, ...]
    judges: tuple[RewardSource, ...] = ()
