"""Whether weights were written to: torch counts every change in place, and a checksum sees the others."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from marl_core.bank.identity.digest import digest


class WeightVersions:
    """Tensors by name and their version counters: torch counts every change in place. Looking costs microseconds.

    Changes through `.data` aren't counted; `checksum` sees those, and costs a reading of all weights.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        tensors = dict(named)
        self._names, self._tensors = list(tensors), list(tensors.values())
        self._versions = self.versions()

    def versions(self) -> list[int]:
        """Each tensor's counter now."""
        return [tensor._version for tensor in self._tensors]

    def changed(self, since: list[int] | None = None) -> list[str]:
        """Names of the tensors written to since `since`, or since the last `note`."""
        now, then = self.versions(), self._versions if since is None else since
        if now == then:
            return []
        return [name for name, one, other in zip(self._names, now, then, strict=True) if one != other]

    def note(self) -> None:
        """Take what is there now as right."""
        self._versions = self.versions()

    @torch.no_grad()
    def checksum(self) -> int:
        """Sum of all tensors' digests: any one change shows."""
        digests = [digest(tensor) for tensor in self._tensors]  # all are started before one is waited for
        return sum(map(int, digests))
