"""The processes of one run as the algorithm sees them; `Ranks` itself is the run of one process.

Every rank knows the whole batch's numbers and shares out the passes: what is computed from the batch (advantages,
whitening, the order of minibatches, metrics) is then the same on all ranks without a word between them, and the same
as in one process. The ranks speak where rows are put together and where gradients are summed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Ranks:
    """One process; `marl_core.parallel.process_group.Group` is the real thing."""

    rank: int = 0
    size: int = 1

    @property
    def seed_parts(self) -> tuple[int, ...]:
        """Further parts of a seed, so that ranks draw different numbers; none on the first rank."""
        return (self.rank,) if self.rank else ()

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def shard(self, rows: Tensor) -> Tensor:
        """This rank's part of the rows [n] of one minibatch: as many as every other rank's, [n / size]."""
        each = len(rows) // self.size
        return rows[self.rank * each : (self.rank + 1) * each]

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in double precision."""
        return list(values)

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """The largest over all ranks."""
        return list(values)

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all ranks."""

    def gather(self, tensor: Tensor) -> Tensor:
        """All ranks' [n, ...] one below the other, [size * n, ...]; a second dimension that differs is filled with 0."""
        return tensor

    def all_gather_object(self, value: Any) -> list[Any]:
        """Each rank's value, in the order of the ranks; anything that JSON can hold."""
        return [value]

    def assert_equal(self, what: str, tensors: Iterable[Tensor]) -> None:
        """Stop the run unless these tensors are bit for bit the same on all ranks."""


ALONE = Ranks()
"""The one process of a run that nobody launched as several."""


def checksum(tensors: Iterable[Tensor]) -> int:
    """A number of the tensors' bits and their places, for comparisons between ranks: 63 bits."""
    total = 0
    for tensor in tensors:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(torch.int64)
        places = torch.arange(1, len(raw) + 1, device=raw.device)
        total = (total * 1_000_003 + int((raw * places).sum())) % (2**63)
    return total
