"""A folder that a command is to write: it must be new, or empty."""

from __future__ import annotations

from pathlib import Path

from marl_core.errors import DataError


def require_new_folder(folder: Path, asked_by: str) -> None:
    """DataError, beginning with `asked_by`, for a folder that holds something, and for a file."""
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise DataError(f"{asked_by} {folder} exists and isn't empty; give a new folder, nothing is overwritten.")
