"""What one pass says of tokens, from drawing them to the loss, and whose numbers they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marl_core.bank.adapters import AdapterBank


@dataclass(frozen=True, slots=True)
class PassOrigin:
    """Whose numbers a pass gave: the bank, the adapter and value head as they were at that moment, and the temperature.

    Two are equal only if the same weights gave the numbers: the weights are told by a checksum, so that any change of
    them shows, however it was made.
    """

    bank: int
    adapter: str | None
    value_head: str | None
    weights: int
    temperature: float

    @classmethod
    def of(cls, bank: AdapterBank, adapter: str | None, value_head: str | None, temperature: float) -> PassOrigin:
        """Whose numbers a pass would give now. Reads the adapter's and head's weights once."""
        names = [name for name in (adapter, value_head) if name is not None]
        return cls(id(bank), adapter, value_head, bank.checksum(*names), temperature)


@dataclass(frozen=True, slots=True)
class PolicyOutput:
    """Log-probs of chosen tokens and entropies, in nats, and values, all float32; zero under a false mask.

    [B] while tokens are drawn, one place after the other; [B, T] for responses. `values` are None without a value head.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None = None
    origin: PassOrigin | None = None
    """Whose numbers these are; None where nobody asks: a scoring pass is of the weights as they are now."""
    token_digests: Tensor | None = None
    """Which tokens each row's numbers are of, [B] int64: `Rollout.digests` at the time. Comes with `origin`."""

    @classmethod
    def cat(cls, parts: Sequence[PolicyOutput]) -> PolicyOutput:
        """Rows of several outputs, one below the other; origin and digests are dropped when there is more than one."""
        if len(parts) == 1:
            return parts[0]
        values = [part.values for part in parts if part.values is not None]
        return cls(
            torch.cat([part.logprobs for part in parts]),
            torch.cat([part.entropy for part in parts]),
            torch.cat(values) if values else None,
        )

    def each(self, change: Callable[[Tensor], Tensor]) -> PolicyOutput:
        """A copy with log-probs, entropy and values changed; the origin stays."""
        values = None if self.values is None else change(self.values)
        return replace(self, logprobs=change(self.logprobs), entropy=change(self.entropy), values=values)

    def select(self, rows: Tensor | slice) -> PolicyOutput:
        """Some of the rows."""
        digests = None if self.token_digests is None else self.token_digests[rows]
        return replace(self.each(lambda tensor: tensor[rows]), token_digests=digests)

    def to(self, device: torch.device | str) -> PolicyOutput:
        """The same on `device`."""
        digests = None if self.token_digests is None else self.token_digests.to(device)
        return replace(self.each(lambda tensor: tensor.to(device)), token_digests=digests)

    def is_of(
        self, bank: AdapterBank, adapter: str, value_head: str | None, temperature: float, token_digests: Tensor
    ) -> bool:
        """Whether a scoring pass of this policy, as it is now, would give these numbers for rows with these digests."""
        if self.origin is None or self.token_digests is None or not torch.equal(self.token_digests, token_digests):
            return False
        if (id(bank), adapter, value_head) != (self.origin.bank, self.origin.adapter, self.origin.value_head):
            return False
        return self.origin == PassOrigin.of(bank, adapter, value_head, temperature)
