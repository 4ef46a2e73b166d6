"""Numbers that the sampling pass sees of its own tokens anyway, and whose they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marl_core.bank.adapters import AdapterBank


@dataclass(frozen=True, slots=True)
class Behavior:
    """Who sampled: the bank, the adapter and value head as they were at that moment, and the temperature.

    Two are equal only if the same weights gave the numbers: the weights are told by a checksum, so that any change of
    them shows, however it was made.
    """

    bank: int
    adapter: str | None
    value_head: str | None
    weights: int
    temperature: float

    @classmethod
    def of(cls, bank: AdapterBank, adapter: str | None, value_head: str | None, temperature: float) -> Behavior:
        """Who would sample now. Reads the adapter's and head's weights once."""
        names = [name for name in (adapter, value_head) if name is not None]
        return cls(id(bank), adapter, value_head, bank.checksum(*names), temperature)


@dataclass(frozen=True, slots=True)
class Captured:
    """What the sampling pass itself saw of its tokens, [B, T] float32: log-probs, entropies, values (None without a head).

    They are old log-probs of these very tokens for the policy that sampled, as long as it hasn't moved: see `belongs_to`.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None
    behavior: Behavior
    tokens: Tensor
    """Which tokens each row's numbers are of, [B] int64: `Rollout.digests` at the time."""

    def belongs_to(
        self, bank: AdapterBank, adapter: str, value_head: str | None, temperature: float, tokens: Tensor
    ) -> bool:
        """Whether a scoring pass of this policy, as it is now, would give these numbers for rows with these digests."""
        if not torch.equal(self.tokens, tokens):
            return False
        if (id(bank), adapter, value_head) != (self.behavior.bank, self.behavior.adapter, self.behavior.value_head):
            return False
        return self.behavior == Behavior.of(bank, adapter, value_head, temperature)

    def select(self, rows: Tensor | slice) -> Captured:
        """Some of the responses."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Captured:
        """The same on `device`."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Captured:
        values = None if self.values is None else change(self.values)
        return replace(
            self,
            logprobs=change(self.logprobs),
            entropy=change(self.entropy),
            values=values,
            tokens=change(self.tokens),
        )
