"""What this machine holds of the hub, by huggingface_hub's own look-up: its variables, its layout. Nothing is downloaded here."""

from __future__ import annotations

import os
import re
from pathlib import Path

from marl_core.artifacts.adapter_files import CONFIG_FILE, AdapterFiles, read_adapter


def cached_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of the hub repository `name`, in the snapshot of `revision` (branch, tag or commit; main when absent).

    None when it isn't on this machine. ValueError when no repository can have this name.
    """
    from huggingface_hub import try_to_load_from_cache  # 0.1 s: only where a hub name is met

    cached = try_to_load_from_cache(name, file, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def is_repo_name(text: str, *, owner: bool = True) -> bool:
    """Whether a repository of the hub can have this name: `owner/name`, and without `owner` a lone `name`, too.

    By huggingface_hub's own rules. Neither the disk nor the hub is asked.
    """
    if "/" not in text and owner:
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # imported there without a word for checkers

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit, which names one state for good; a branch or a tag may move."""
    return re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None


def is_hub_adapter(path: str) -> bool:
    """Whether an adapter's path is a hub name, `owner/name`: nothing of that name is here."""
    return not os.path.exists(os.path.expanduser(path)) and is_repo_name(path)


def adapter_folder(path: str, revision: str | None = None, subfolder: str | None = None) -> str | None:
    """The folder of an adapter, `subfolder` included; of a hub name the snapshot in the cache, None where it isn't there."""
    if not is_hub_adapter(path):
        return os.path.join(path, subfolder) if subfolder else path
    config = cached_file(path, f"{subfolder}/{CONFIG_FILE}" if subfolder else CONFIG_FILE, revision)
    return str(config.parent) if config is not None else None


def cached_adapter(
    path: str, asked_by: str, revision: str | None = None, subfolder: str | None = None
) -> AdapterFiles | None:
    """Config and tensor names of an adapter: a folder, or a hub name in this machine's cache. For checks before a run.

    None for a hub name that has to be fetched first. DataError with `asked_by` when files are missing, damaged or pickled.
    """
    folder = adapter_folder(path, revision, subfolder)
    return None if folder is None else read_adapter(folder, asked_by)
