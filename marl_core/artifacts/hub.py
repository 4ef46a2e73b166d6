"""What this machine holds of the hub, by huggingface_hub's own look-up (its variables, its layout), and whether the hub can be reached."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from marl_core.artifacts.adapter_files import CONFIG_FILE, AdapterFiles, read_adapter
from marl_core.errors import DataError, in_words

PROBE_SECONDS = 5.0
"""How long the hub may take to answer at all. Its libraries try for a minute, for each file."""
PROBED_AGAIN_SECONDS = 60.0
"""How long a hub that didn't answer isn't asked again: a notebook's network may come back."""
_probed: dict[str, tuple[float, str | None]] = {}
"""By endpoint: when it was last asked, and why it can't be reached; None: it answered."""


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


@contextmanager
def hub_read(name: str, asked_by: str, revision: str | None = None) -> Iterator[None]:
    """Around whatever reads `name` with a library of the hub's: one question finds out whether the hub is there at all.

    Where it isn't, the libraries read this machine's cache alone, and what that lacks is a DataError of `asked_by` (a config key), in one
    sentence. Nothing is asked for a folder or a file, or a name that no repository can have. Names that a hub which answers doesn't
    know, or doesn't give, stay what the libraries make of them.
    """
    if os.path.exists(os.path.expanduser(name)) or not is_repo_name(name, owner=False):
        yield
        return
    reason = hub_away()
    if reason is None:
        yield
        return
    try:
        with _offline():
            yield
    except Exception as error:
        if not _lacks_the_hub(error):
            raise
        raise _not_to_be_had(name, asked_by, revision, reason) from error


def require_hub(name: str, asked_by: str, revision: str | None = None) -> None:
    """DataError, in the same sentence, when `name` has to be fetched and the hub can't be reached: before anything heavy is imported."""
    reason = hub_away()
    if reason is not None:
        raise _not_to_be_had(name, asked_by, revision, reason)


def _not_to_be_had(name: str, asked_by: str, revision: str | None, reason: str) -> DataError:
    at = f" at revision {revision!r}" if revision else ""
    script = "examples/model.py"
    here = f" In this folder `python {script}` gets a small model without the hub"
    small = (
        in_words(f"{here}: add `--set model.path=$(python {script})`.", f"{here}.") if os.path.isfile(script) else ""
    )
    return DataError(
        f"{asked_by}: {name!r} is no local folder and could not be downloaded from the hub{at}: {reason}, and this machine's "
        "cache lacks it. "
        f"Give a folder, or set HF_ENDPOINT to a mirror that can be reached.{small if asked_by == 'model.path' else ''}"
    )


def hub_away() -> str | None:
    """Why nothing can be had from the hub now, as a clause; None when it answers. Asked once, in the way its own library asks."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # as validate_repo_id above

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    endpoint = constants.ENDPOINT
    when, reason = _probed.get(endpoint, (-PROBED_AGAIN_SECONDS, ""))
    if reason is not None and time.monotonic() - when >= PROBED_AGAIN_SECONDS:
        try:
            get_session().head(endpoint, timeout=PROBE_SECONDS)  # any answer will do
            reason = None
        except Exception as error:  # of whichever library huggingface_hub asks with, a proxy's or a certificate's
            reason = f"{endpoint} can't be reached ({str(error) or type(error).__name__:.150})"
        _probed[endpoint] = time.monotonic(), reason
    return reason


@contextmanager
def _offline() -> Iterator[None]:
    """A block in which the hub's libraries ask the cache alone, as with HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    places: list[Any] = [constants, sys.modules.get("datasets.config")]  # the second took it over as it was imported
    before = [(place, place.HF_HUB_OFFLINE) for place in places if place is not None]
    for place, _ in before:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, was in before:
            place.HF_HUB_OFFLINE = was


def _lacks_the_hub(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that the hub would be needed."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError):
            return True
        error = error.__cause__ or error.__context__
    return False
