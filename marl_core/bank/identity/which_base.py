"""Whether the base that an adapter names is the one in memory: by its place, by its files, by its weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from marl_core.artifacts.adapter_files import AdapterFiles
from marl_core.artifacts.hub import cached_file, is_repo_name
from marl_core.artifacts.model_files import CONFIG_FILE
from marl_core.bank.identity.fingerprint import Difference, Fingerprint, difference
from marl_core.bank.read_through import CannotRead, fingerprint_of_folder


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a base was read from, its weights untouched since. `folder`: on this machine, None if that isn't known."""

    source: str
    revision: str | None
    folder: Path | None

    @classmethod
    def of(cls, source: str, revision: str | None = None) -> Origin:
        """The origin of what transformers loads for `source`."""
        return cls(source, revision, located(source, revision))


@dataclass(frozen=True, slots=True)
class Answer:
    """`same`: None where it can't be told; `evidence` then says why, and otherwise by what."""

    same: bool | None
    evidence: str
    difference: Difference | None = None


def located(name: str, revision: str | None = None) -> Path | None:
    """A model's folder on this machine: the folder itself, or the hub cache's snapshot of that name."""
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        return Path(folder)
    if not is_repo_name(name, owner=False):  # a path that isn't here
        return None
    config = cached_file(name, CONFIG_FILE, revision)
    return config.parent if config is not None else None


def which_base(files: AdapterFiles, origin: Origin | None, mine: Callable[[], Fingerprint | None]) -> Answer:
    """Compare the base that `files` names with the one in memory, which came from `origin` or of which `mine` knows.

    Without an origin (the base was changed, or given as an object) only weights count.
    """
    name = files.base_name
    if name is None:
        return Answer(None, "it names no base")
    revision = files.config.get("revision")
    revision = revision if isinstance(revision, str) and revision else None
    folders = list(_named(name, revision, files.folder))
    if origin is not None:
        if (
            name == origin.source
            and revision in (None, origin.revision)
            and not os.path.isdir(os.path.expanduser(name))
        ):
            return Answer(True, f"it names {name}")  # a name on the hub
        if origin.folder is not None and any(_same_files(folder, origin.folder) for folder in folders):
            return Answer(True, f"it names {name}")
    if not folders:
        return Answer(None, f"its base {name!r} isn't here")
    known = mine()
    if known is None:
        return Answer(None, "this base's own weights aren't known")
    answers = [_by_weights(folder, name, known) for folder in folders]
    for wanted in (True, None, False):
        for answer in answers:
            if answer.same is wanted:
                return answer
    raise AssertionError("one of the three holds")


def _by_weights(folder: Path, name: str, known: Fingerprint) -> Answer:
    digests = any(entry.get("digest") for entry in known["tensors"].values())
    dtype = known["dtype"] if digests and known["dtype"] in ("bfloat16", "float16") else None
    try:
        theirs = fingerprint_of_folder(folder, dtype=dtype, digests=digests)
    except CannotRead as error:
        return Answer(None, f"its base {name!r} {error}")
    if theirs["packed"] != known["packed"]:
        return Answer(
            None, f"of its base {name!r} and this one, one has quantized weights in its files and the other doesn't"
        )
    differing = difference(known, theirs)
    if not differing.compared:
        return Answer(None, f"none of the tensors of its base {name!r} has the name and shape of one here")
    return Answer(not differing.names, f"compared with {name}", differing)


def _named(name: str, revision: str | None, adapter: Path) -> Iterator[Path]:
    """Folders that an adapter can mean by `name`: a relative one may begin here or anywhere above the adapter."""
    folder_here = located(name, revision)
    if folder_here is not None:
        yield folder_here
    if not os.path.isabs(os.path.expanduser(name)):
        for above in adapter.resolve().parents:
            folder = above / name
            if os.path.isfile(folder / CONFIG_FILE):
                yield folder


def _same_files(one: Path, other: Path) -> bool:
    """Whether two folders are one, or hold the very same weight files (links, snapshots of one cache)."""
    try:
        if os.path.samefile(one, other):
            return True
        weights = [{_file(file) for file in folder.glob("*.safetensors")} for folder in (one, other)]
    except OSError:
        return False
    return bool(weights[0]) and weights[0] == weights[1]


def _file(path: Path) -> tuple[int, int]:
    there = path.stat()
    return there.st_dev, there.st_ino
