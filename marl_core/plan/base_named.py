"""Adapters whose own config names another base than the run's, as far as names and files tell: a run compares the weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from marl_core.artifacts.adapter_files import AdapterFiles, read_adapter
from marl_core.artifacts.hub import cached_file, is_repo_name
from marl_core.artifacts.model_files import CONFIG_FILE, read_model
from marl_core.errors import DataError
from marl_core.plan.adapter_checks import named_adapters
from marl_core.plan.chosen import Chosen

SAMPLES, SAMPLE_BYTES = 16, 4096
"""How much of two weight files of one size is compared: copies agree everywhere, other weights hardly anywhere."""


def base_warnings(plan: Chosen) -> Iterator[str]:
    """A word on each adapter that says it was trained on another model. Not on those for a base that the run makes itself by a merge."""
    model = plan.config.model
    is_prepared = plan.hooks.implements(plan.reference, "marl_prepare_base")
    for key, folder, use in named_adapters(plan):
        if is_prepared and use != "merged":
            continue  # it may have been trained on what the merge will give
        try:
            files, base = read_adapter(folder, key), read_model(model.path, model.revision)
        except DataError:
            continue  # told elsewhere
        name = files.base_name
        if (
            name is None
            or name == model.path
            or not _is_another(files, name, model.path, base.folder if base else None)
        ):
            continue
        yield (
            f"{key}: {files.folder} was trained on {name!r}, as its own config says, and the base of this run is {model.path!r}. The run "
            "compares their weights before it trains, as far as both are here; if they are other models, use the adapter's own base."
        )


def _is_another(files: AdapterFiles, name: str, path: str, base: Path | None) -> bool:
    """Whether `name` is most likely another model than the base at `path`, which lies in the folder `base` if it is here."""
    folders = list(_folders(files, name))
    if base is not None and folders:
        return not any(_same_model(folder, base) for folder in folders)
    both_names = is_repo_name(name) and is_repo_name(path)
    return both_names and not os.path.isdir(path) and not folders


def _folders(files: AdapterFiles, name: str) -> Iterator[Path]:
    """Folders that an adapter can mean by its base's name: from here, from any folder above itself, or in the hub's cache."""
    written = Path(os.path.expanduser(name))
    places = (
        [written]
        if written.is_absolute()
        else [written, *(above / written for above in files.folder.resolve().parents)]
    )
    yield from (place for place in places if os.path.isfile(place / CONFIG_FILE))
    revision = files.config.get("revision")
    if is_repo_name(name, owner=False) and not os.path.isdir(written):
        config = cached_file(name, CONFIG_FILE, revision if isinstance(revision, str) and revision else None)
        if config is not None:
            yield config.parent


def _same_model(one: Path, other: Path) -> bool:
    """Whether two folders are one, or hold copies of the same weights; also where they can't be read."""
    try:
        if os.path.samefile(one, other):
            return True
        files, others = ({file.name: file for file in folder.glob("*.safetensors")} for folder in (one, other))
        if not files or not others:
            return True  # pickles, or no weights: nothing is known
        return files.keys() == others.keys() and all(_same_bytes(file, others[name]) for name, file in files.items())
    except OSError:
        return True


def _same_bytes(one: Path, other: Path) -> bool:
    """Whether two files have one size, and the same bytes at a few places from beginning to end."""
    size = one.stat().st_size
    if size != other.stat().st_size:
        return False
    with one.open("rb") as first, other.open("rb") as second:
        for place in range(SAMPLES):
            start = max(0, size - SAMPLE_BYTES) * place // (SAMPLES - 1)
            first.seek(start)
            second.seek(start)
            if first.read(SAMPLE_BYTES) != second.read(SAMPLE_BYTES):
                return False
    return True
