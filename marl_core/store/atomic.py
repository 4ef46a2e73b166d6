"""Putting a folder in another's place so that, whenever the power goes, the old one or the new one is there."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

_HERE = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE


def put_in_place(new: Path, place: Path) -> None:
    """Make `new` be `place`. What `place` held before goes, and only after `new` is there."""
    if not place.exists():
        new.rename(place)
    elif exchange(new, place):
        shutil.rmtree(new, ignore_errors=True)
    else:  # no exchange on this system: for a moment neither name is there, and `tidy` puts the old one back
        aside = place.with_name(f".{place.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)
        new.rename(place)
        shutil.rmtree(aside, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step of the file system; False where the system or the file system can't (Linux can)."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)


def tidy(folder: Path) -> None:
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
