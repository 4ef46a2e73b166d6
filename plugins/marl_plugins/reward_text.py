"""Shaping by form alone: points for a format, a soft bound on length. Meant as one of several rewards."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Self

from pydantic import Field, PositiveInt, model_validator

from marl_core import Strategy, hookimpl

if TYPE_CHECKING:
    from marl_core import RewardFunction, Rollout


class LengthFormat(Strategy):
    """Points for a text that matches a pattern, and a soft penalty for one that is too long.

    The penalty is 0 up to max_tokens - cushion tokens, falls in a straight line to -1 at max_tokens, and stays there:
    Yu et al. 2025 (arXiv:2503.14476), eq. 13.
    """

    pattern: str | None = Field(
        default=None, description="Regular expression that must be found; anchor it with ^ and $; . matches line ends."
    )
    points: float = Field(default=1.0, description="Points for a text in which the pattern is found; else 0.")
    max_tokens: PositiveInt | None = Field(default=None, description="Length in tokens from which the penalty is -1.")
    cushion: PositiveInt = Field(default=16, description="Tokens below max_tokens over which the penalty grows.")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.pattern is None and self.max_tokens is None:
            raise ValueError("give a pattern, or max_tokens, or both")
        if self.max_tokens is not None and self.cushion > self.max_tokens:
            raise ValueError(f"cushion {self.cushion} is more than max_tokens {self.max_tokens}")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"pattern: {self.pattern!r} is no regular expression: {error}") from error
        return self

    @hookimpl
    def marl_describe(self) -> str:
        """For `marl check`."""
        format = [] if self.pattern is None else [f"{self.points:g} for texts that match {self.pattern!r}"]
        length = [] if self.max_tokens is None else [f"down to -1 near {self.max_tokens} tokens"]
        return ", ".join(format + length)

    @hookimpl
    def marl_reward(self) -> RewardFunction:
        """Rollout -> scores [B]."""
        return self._score

    def _score(self, rollout: Rollout) -> list[float]:
        return [
            self._format(text) + self._length(int(length))
            for text, length in zip(rollout.texts, rollout.lengths, strict=True)
        ]

    def _format(self, text: str) -> float:
        matches = self.pattern is not None and re.search(self.pattern, text, flags=re.DOTALL) is not None
        return self.points if matches else 0.0

    def _length(self, tokens: int) -> float:
        if self.max_tokens is None:
            return 0.0
        return max(-1.0, min(0.0, (self.max_tokens - self.cushion - tokens) / self.cushion))
