"""A disk that is full: how much a checkpoint needs, what is missing, and when to give up."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from marl_core.errors import DataError, warn
from marl_core.store import checkpoint

if TYPE_CHECKING:
    from marl_core.run.runner import Runner

MOST_FAILURES = 3
"""Saves that may fail in a row before the run ends: after that, going on would only be more work to lose."""
BESIDE = 256 * 1024
"""Bytes allowed for a checkpoint's JSON files and for the file system's own."""


class SaveFailed(DataError):
    """A checkpoint could not be written; those before it are whole."""


def needed(runner: Runner) -> int:
    """Bytes of one checkpoint: the weights that learn, and two moments of each."""
    roles = runner.roles.trained.parameters(runner.bank)
    return BESIDE + 3 * sum(p.numel() * p.element_size() for found in roles.values() for p in found.values())


def save_failed(runner: Runner, folder: Path, error: Exception) -> SaveFailed:
    """The error of a save that failed: which checkpoint, why, how many bytes are missing, what is still whole."""
    whole = [path.name for path in checkpoint.saved(folder) if checkpoint.damage(path) is None]
    return SaveFailed(
        f"save: the checkpoint of step {runner.done} could not be written into {folder} ({_reason(error)}). "
        f"{_room(folder, needed(runner))} {f'{whole[-1]} is whole' if whole else 'There is no checkpoint yet'}. "
        "Make room on that disk, or lower run.keep."
    )


def warn_if_short(runner: Runner) -> None:
    """A warning at the start when the disk hasn't room for the checkpoints that will be kept and the final adapter."""
    if runner.folder is None or not runner.folder.path.exists():
        return
    most = needed(runner) * (runner.config.run.keep + 2)
    if shutil.disk_usage(runner.folder.path).free < most:
        warn(f"run.folder: {runner.folder.path} may run out of room for checkpoints. {_room(runner.folder.path, most)}")


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).strip()


def _room(folder: Path, need: int) -> str:
    there = folder if folder.exists() else folder.parent
    free = shutil.disk_usage(there).free
    missing = f"; {need - free:,} bytes are missing" if need > free else ""
    return f"About {need:,} bytes are needed, {free:,} are free{missing}."
