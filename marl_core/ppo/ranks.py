"""The processes of one run as the algorithm sees them; `Ranks` itself is the run of one process.

Every rank knows the whole batch's numbers and shares out the passes: what is computed from the batch (advantages,
whitening, the order of minibatches, metrics) is then the same on all ranks without communication, and the same
as in one process. The ranks communicate where rows are gathered and where gradients are summed.
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
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def shard(self, rows: Tensor) -> Tensor:
        """This rank's part of the rows [n] of one minibatch: as many as every other rank's, [n / size]."""
        per_rank = len(rows) // self.size
        return rows[self.rank * per_rank : (self.rank + 1) * per_rank]

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all ranks, in double precision."""
        return list(values)

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over all ranks."""
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
        """RankError unless these tensors are bit for bit the same on all ranks; `what` names them in the error."""


ONE_PROCESS = Ranks()
"""The one process of a run that nobody launched as several."""


def checksum(tensors: Iterable[Tensor]) -> int:
    """A 63-bit checksum of the tensors' bytes and their positions, for comparisons between ranks."""
    total = 0
    for tensor in tensors:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(torch.int64)
        positions = torch.arange(1, len(raw) + 1, device=raw.device)
        total = (total * 1_000_003 + int((raw * positions).sum())) % (2**63)
    return total
