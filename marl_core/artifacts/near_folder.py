"""The folder here that a mistyped path may mean."""

from __future__ import annotations

import os

from marl_core.errors import near_match


def near_folder(path: str) -> str | None:
    """The path with each part that isn't there replaced by a folder of nearly that name; None when there is no such folder."""
    written = os.path.expanduser(path)
    found = os.sep if os.path.isabs(written) else ""
    for part in written.split("/"):
        if part in ("", "."):
            continue
        if part == ".." or os.path.isdir(os.path.join(found, part)):
            found = os.path.join(found, part)
            continue
        try:
            names = [name for name in os.listdir(found or ".") if os.path.isdir(os.path.join(found, name))]
        except (OSError, ValueError):
            return None
        near = near_match(part, names)
        if near is None:
            return None
        found = os.path.join(found, near)
    return found if found and os.path.isdir(found) else None
