"""Seeds that depend on the run's seed, the step and the purpose alone: resume needs no random state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any parts, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded from the parts."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@contextmanager
def seeded(device: torch.device, *parts: object) -> Iterator[None]:
    """A block in which the global random state is seeded from the parts, for LoRA dropout; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(*parts))
        yield
