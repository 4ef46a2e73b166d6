"""A disk that is full: how much a checkpoint needs, what is missing, and when to give up."""

from __future__ import annotations

import shutil
from pathlib import Path

from marl_core.bank.adapters import AdapterBank
from marl_core.errors import DataError, warn
from marl_core.ppo.roles import TrainableRoles
from marl_core.store import checkpoint

FAILED_SAVES_ALLOWED = 3
"""Saves that may fail in a row before the run ends: after that, going on would only be more work to lose."""
OTHER_FILES_BYTES = 256 * 1024
"""Bytes allowed for a checkpoint's JSON files and for the file system's own."""


class SaveFailed(DataError):
    """A checkpoint could not be written; those before it are whole."""


def checkpoint_bytes(bank: AdapterBank, trained: TrainableRoles) -> int:
    """Bytes of one checkpoint: the weights that learn, and two moments of each."""
    roles = trained.parameters(bank)
    return OTHER_FILES_BYTES + 3 * sum(
        p.numel() * p.element_size() for parameters in roles.values() for p in parameters.values()
    )


def save_failed(folder: Path, step: int, needed: int, error: Exception) -> SaveFailed:
    """The error of a save that failed: which checkpoint, why, how many bytes are missing, which checkpoint is intact."""
    intact = [path.name for path in checkpoint.saved(folder) if checkpoint.damage(path) is None]
    way_out = "Make room on that disk, or lower run.keep." if len(intact) > 1 else "Make room on that disk."
    return SaveFailed(
        f"save: the checkpoint of step {step} could not be written into {folder} ({_reason(error)}). "
        f"{_room(folder, needed)} {f'{intact[-1]} is whole' if intact else 'There is no checkpoint yet'}. {way_out}"
    )


def warn_if_short(folder: Path, needed: int) -> None:
    """A warning at the start when the disk hasn't room for the `needed` bytes of all checkpoints kept and the final adapter."""
    if folder.exists() and shutil.disk_usage(folder).free < needed:
        warn(f"run.folder: {folder} may run out of room for checkpoints. {_room(folder, needed)}")


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).strip()


def _room(folder: Path, need: int) -> str:
    existing = folder if folder.exists() else folder.parent
    free = shutil.disk_usage(existing).free
    missing = f"; {size_text(need - free)} are missing" if need > free else ""
    return f"About {size_text(need)} are needed, {size_text(free)} are free{missing}."


def size_text(count: int) -> str:
    """Bytes as disks are sold and as `df -H` tells them: kB, MB, GB of thousands."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 100 * size else f"{count / size:,.0f} {unit}"
    return f"{count} bytes"
