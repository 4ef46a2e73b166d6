"""A checksum of a tensor's bytes that also sees where they are: int64 sums, at about the speed of memory.

It tells honest changes, not forged ones. Measured on one core of a server: 60 ms per GB (plain sums: 28, crc32: 150,
sha256: 530).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

COLUMNS = 4093
"""A prime: rows of a weight that change places land in other columns."""
_SEED = 20_11_2003


@torch.no_grad()
def digest(tensor: Tensor) -> Tensor:
    """int64 scalar. Equal bytes in the same order give equal digests on every device.

    Tensors made of other tensors (quantized, sharded ones) count by their parts.
    """
    parts = [_columns(part) for part in byte_tensors(tensor) if part.numel()]
    if not parts:
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    result = parts[0]
    for part in parts[1:]:
        result = result * 31 + part
    return result


def byte_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensor's bytes, flat; one tensor for each plain tensor it is made of."""
    if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return [flat for part in parts if isinstance(part, Tensor) for flat in byte_tensors(part)]
    return [tensor.detach().contiguous().reshape(-1).view(torch.uint8)]


def _columns(flat: Tensor) -> Tensor:
    """Sum of the words of each column, weighted by an odd number for each; the last bytes count singly."""
    if flat.device.type not in ("cpu", "cuda"):  # others don't sum int64 alike
        flat = flat.cpu()
    if flat.storage_offset() % 8:  # a slice of a file in memory: words must begin at a multiple of eight
        flat = flat.clone()
    in_words = flat.numel() // 8 * 8
    result = torch.full((), flat.numel(), dtype=torch.int64, device=flat.device)
    if in_words:
        result = result + _weighted(flat[:in_words].view(torch.int64))
    return result * 31 + _weighted(flat[in_words:].to(torch.int64)) if in_words < flat.numel() else result


def _weighted(words: Tensor) -> Tensor:
    rows = len(words) // COLUMNS
    weights = _weights(words.device)
    result = words[rows * COLUMNS :].mul(weights[: len(words) - rows * COLUMNS]).sum(dtype=torch.int64)
    if rows:
        result = result * 31 + words[: rows * COLUMNS].view(rows, COLUMNS).sum(0, dtype=torch.int64).mul(weights).sum()
    return result


_known: dict[torch.device, Tensor] = {}


def _weights(device: torch.device) -> Tensor:
    if device not in _known:
        drawn = torch.randint(-(2**62), 2**62, (COLUMNS,), generator=torch.Generator().manual_seed(_SEED))
        _known[device] = (drawn * 2 + 1).to(device)
    return _known[device]
