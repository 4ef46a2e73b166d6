"""Putting a folder in another's place so that, whenever the power goes, the old one or the new one is there or comes back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def replace_folder(new: Path, place: Path) -> None:
    """Make `new` be `place`. What `place` held before goes, and only after `new` is there.

    Between the two renames neither stands under the name; `recover` puts the old one back, and resuming a run calls it.
    """
    aside = place.with_name(f".{place.name}.old")
    if place.exists():
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)
    new.rename(place)
    shutil.rmtree(aside, ignore_errors=True)


def recover(folder: Path) -> None:
    """Remove what a killed save left in `folder`, and put back what it had moved aside."""
    for aside in folder.glob(".*.old"):
        place = aside.with_name(aside.name.removeprefix(".").removesuffix(".old"))
        if aside.is_dir() and not place.exists():
            aside.rename(place)
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
