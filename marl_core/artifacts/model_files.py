"""What a model folder says without torch: its config.json, and its tensors' shapes from the safetensors headers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marl_core.artifacts.adapter_files import unpacked_shapes
from marl_core.artifacts.hub import cached_file, is_commit, is_repo_name
from marl_core.artifacts.near_folder import near_folder
from marl_core.errors import ConfigError, DataError

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model folder and its config.json."""

    folder: Path
    config: Mapping[str, Any]

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, by the index where there is one; empty when there are none."""
        index = self.folder / INDEX_FILE
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return [self.folder / name for name in names]
        return [self.folder / SINGLE_FILE] if (self.folder / SINGLE_FILE).is_file() else []

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight's shape, of 4-bit weights the unpacked one. Raises DataError when a file is missing or damaged."""
        try:
            files = self.weight_files
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"model.path: {self.folder / INDEX_FILE} can't be read: {error!r}. Copy the folder again."
            ) from error
        missing = [file.name for file in files if not file.is_file()]
        if missing or not files:
            what = f"lacks {', '.join(missing)}" if missing else "has no safetensors weights"
            raise DataError(f"model.path: {self.folder} {what}. Copy the whole folder.")
        return {name: shape for file in files for name, shape in unpacked_shapes(file, "model.path").items()}

    def stored_bytes(self) -> int:
        """Bytes of all tensors in the files: what the headers leave."""

        def tensors(file: Path) -> int:
            with file.open("rb") as stream:
                return file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")

        return sum(tensors(file) for file in self.weight_files)


def cached_model_config(path: str, asked_by: str, revision: str | None = None) -> Mapping[str, Any] | None:
    """The config.json of a model: a folder, or a hub name in this machine's cache. For checks before a run.

    None for a hub name that has to be fetched first. DataError with `asked_by` when there can be no such model.
    """
    files = read_model(path, revision, asked_by)
    return None if files is None else files.config


def read_model(path: str, revision: str | None = None, asked_by: str = "model.path") -> ModelFiles | None:
    """A local model, or a hub model that is in this machine's cache; None for a hub name that isn't.

    Raises DataError with `asked_by` for a path that can only be local and holds no model.
    """
    folder = Path(os.path.expanduser(path))
    if not os.path.isdir(folder):
        if not is_repo_name(path, owner=False):
            near = near_folder(path)
            hint = f"Did you mean {near!r}?" if near else f"Give a folder with {CONFIG_FILE}, or a hub name."
            raise DataError(f"{asked_by}: there is no folder {path!r}, and the hub has no such names. {hint}")
        file = cached_file(path, CONFIG_FILE, revision)
        return ModelFiles(file.parent, _read_config(file, asked_by)) if file is not None else None
    if not (folder / CONFIG_FILE).is_file():
        hint = (
            " It is an adapter: give the base it was trained on." if (folder / "adapter_config.json").is_file() else ""
        )
        raise DataError(
            f"{asked_by}: the folder {path!r} holds no {CONFIG_FILE}, so it is no model.{hint or ' Check the path.'}"
        )
    return ModelFiles(folder, _read_config(folder / CONFIG_FILE, asked_by))


def unpinned_code(path: str, revision: str | None, tokenizer: str | None = None) -> str | None:
    """Why code that comes with a model may not be run: it isn't the commit that somebody has read. None where it may."""
    if not os.path.isdir(os.path.expanduser(path)) and not is_commit(revision):
        return (
            f"code of {path!r} would run as {f'{revision!r} points to' if revision else 'its newest version stands'}. "
            "Set model.revision to the full commit (40 digits) that you have read."
        )
    if tokenizer is not None and not os.path.isdir(os.path.expanduser(tokenizer)):
        return f"code of the tokenizer {tokenizer!r} would run as its newest version stands. Download it and give the folder."
    return None


def require_pinned_code(path: str, revision: str | None, tokenizer: str | None = None) -> None:
    """ConfigError where code that comes with a model may not be run, as `unpinned_code` says."""
    unpinned = unpinned_code(path, revision, tokenizer)
    if unpinned:
        raise ConfigError(f"trust_remote_code: {unpinned}")


def _read_config(file: Path, asked_by: str) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{asked_by}: {file} is not valid JSON ({error}). Copy the model again.") from error
    if not isinstance(config, dict):
        raise DataError(
            f"{asked_by}: {file} holds a {type(config).__name__}, not a model's config. Copy the model again."
        )
    return config
