"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from marl_core.run.swap import flush_folder, put_in_place


def write_text(file: Path, text: str) -> None:
    """Write beside, flush to disk, rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def write_json(file: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_line(file: Path, value: Any) -> None:
    """One JSON object as one more line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(value, ensure_ascii=False) + "\n")


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSON-lines file of steps; from a line cut short by a crash on, nothing."""
    if file.is_file():
        for line in file.read_bytes().split(b"\n"):  # not splitlines: texts may hold other line ends
            try:
                value = json.loads(line) if line.strip() else None
            except ValueError:  # cut inside JSON, or inside a character
                return
            if isinstance(value, dict) and isinstance(value.get("step"), int):
                yield value


def keep_lines(file: Path, last_step: int) -> None:
    """Drop the lines of steps after `last_step`: they will be run again."""
    if file.is_file():
        kept = [line for line in read_lines(file) if line["step"] <= last_step]
        write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well, and vanishes when it doesn't."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                flush_file(file)
            else:
                flush_folder(file)
        flush_folder(temporary)
        put_in_place(temporary, folder)
        flush_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush_file(file: Path) -> None:
    """fsync of a file that somebody else wrote; nothing if there is none."""
    if file.is_file():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def sha256(file: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
