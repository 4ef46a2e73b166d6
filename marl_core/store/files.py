"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from marl_core.store.atomic import flush_folder, replace_folder


def write_text(file: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Write beside, flush to disk, rename; nothing is left beside when that fails."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def strict_json(value: Any, **options: Any) -> str:
    """JSON that every reader takes: a number that isn't finite becomes null. `options`: further ones of `json.dumps`."""
    options = {"ensure_ascii": False, **options, "allow_nan": False}
    try:
        return json.dumps(value, **options)
    except (ValueError, TypeError):  # not finite, or a mapping that is no dict
        return json.dumps(_finite(value), **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def write_json(file: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(file, strict_json(value, indent=2) + "\n")


def append_line(file: Path, value: Any) -> None:
    """`append_lines` of one."""
    append_lines(file, [value])


def append_lines(file: Path, values: Iterable[Any]) -> None:
    """Append plain values to a file of JSON lines: all of them, or an OSError and the file as it was (half a line would hide the next)."""
    content = "".join(strict_json(value) + "\n" for value in values).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab", buffering=0) as stream:
        before = os.fstat(stream.fileno()).st_size
        try:
            remaining = memoryview(content)
            while remaining:
                remaining = remaining[stream.write(remaining) :]
        except OSError:
            os.truncate(stream.fileno() if os.truncate in os.supports_fd else file, before)
            raise


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
        lines = [line for line in read_lines(file) if line["step"] <= last_step]
        write_text(file, "".join(strict_json(line) + "\n" for line in lines))


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
        replace_folder(temporary, folder)
        flush_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush_file(file: Path) -> None:
    """fsync of a file that somebody else wrote; nothing if there is none."""
    if file.is_file():
        with file.open("rb+" if os.name == "nt" else "rb") as stream:  # Windows flushes only what may be written
            os.fsync(stream.fileno())


def sha256(file: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
