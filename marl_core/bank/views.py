"""Views: declarations of which weights to look through. The core opens them; several may share one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from marl_core.ppo.types import Rollout

Position = Literal["last-attended", "last-non-pad"]

ReferenceFunction: TypeAlias = "Callable[[Rollout], Tensor]"
"""A reference whose weights live elsewhere: Rollout -> log-probs [B, T] float32 of the response tokens."""

RewardFunction: TypeAlias = "Callable[[Rollout], Tensor | Sequence[float | None] | Sequence[Sequence[float] | None]]"
"""A reward: Rollout -> scores [B], or for tokens [B, T] (a list: one number for each token of a response); None abstains."""


@dataclass(frozen=True, slots=True)
class View:
    """The shared base seen through one adapter; None is the bare base."""

    adapter: str | None


@dataclass(frozen=True, slots=True)
class ScoreView:
    """A scalar head on the hidden state of one token, seen through one adapter.

    `position` says which token: the last one of the sequence, or the last that isn't `pad_id`, which is what
    transformers' classifiers read (the two differ where pad is also the stop token).
    """

    view: View
    head: str
    position: Position = "last-attended"
    pad_id: int | None = None
