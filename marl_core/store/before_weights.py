"""What a folder's names alone tell of a run or a dump in it: refused before torch is loaded, and by those who read it again."""

from __future__ import annotations

import os
from pathlib import Path

from marl_core.errors import RESUME, ConfigError, DataError, in_words

CONFIG_FILE, DUMP_FILE = "config.yaml", "dump.json"


def refuse_taken(folder: Path) -> None:
    """ConfigError where a new run would be written over another one."""
    if os.path.exists(folder / CONFIG_FILE):
        raise ConfigError(
            f"run.folder: {folder} already holds a run. Go on with it by "
            f"{in_words(f'`marl run {folder} --resume`', RESUME[1])}, or give another folder."
        )


def require_run(folder: Path, asked_by: str) -> Path:
    """The config file of the run in `folder`; DataError where there is none."""
    file = folder / CONFIG_FILE
    if not os.path.isfile(file):
        missing = "there is no folder" if not os.path.isdir(folder) else "there is no run in"
        raise DataError(
            f"{asked_by}: {missing} {folder} (no {CONFIG_FILE}). Give a run folder, or an adapter folder with --model BASE."
        )
    return file


def require_dump(folder: Path) -> None:
    """DataError for a folder that is no dump; of a run's folder it names the dumps in it."""
    if os.path.isfile(folder / DUMP_FILE):
        return
    what = f"{folder} is no dump (no {DUMP_FILE} in it)" if os.path.isdir(folder) else f"there is no folder {folder}"
    found = sorted(file.parent for file in folder.glob(f"dumps/*/{DUMP_FILE}")) if os.path.isdir(folder) else []
    hint = (
        f"Did you mean {found[-1]}?"
        if found
        else f"{folder} is a run in which no phase failed, so there is nothing to replay."
        if os.path.isfile(folder / CONFIG_FILE)
        else "Give a folder RUN/dumps/step-NNNNNN-PHASE that a run wrote."
    )
    raise DataError(f"replay: {what}. {hint}")
