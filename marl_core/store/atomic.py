"""Replacing a folder so that after a crash at any moment the old one or the new one is there, or can be recovered."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def replace_folder(new: Path, target: Path) -> None:
    """Rename the folder `new` to `target`; an older `target` is deleted once `new` is there.

    Between the two renames no folder has the name; `recover`, which resuming a run calls, then restores the old one.
    """
    aside = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    new.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def recover(folder: Path) -> None:
    """Remove what a killed save left in `folder`, and put back what it had moved aside."""
    for aside in folder.glob(".*.old"):
        target = aside.with_name(aside.name.removeprefix(".").removesuffix(".old"))
        if aside.is_dir() and not target.exists():
            aside.rename(target)
        elif aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
    for stray in folder.glob(".*.tmp"):
        if stray.is_dir():
            shutil.rmtree(stray, ignore_errors=True)
        else:
            stray.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """fsync of a folder's list of names; nothing where a system gives no handle to a folder (Windows)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
