"""Numbers that the sampling pass sees of its own tokens anyway."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Captured:
    """What the sampling pass itself saw of its tokens, [B, T] float32: log-probs, entropies, values (None without a head)."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None

    def select(self, rows: Tensor | slice) -> Captured:
        """Some of the responses."""
        return Captured(self.logprobs[rows], self.entropy[rows], None if self.values is None else self.values[rows])
