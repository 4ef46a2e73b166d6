"""A first look at a prompts file without the datasets library: is it there, of a known kind, and has it the column?"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from marl_core.errors import DataError, near_match

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
FIRST_ROWS = 20
MAX_JSON_BYTES = 20_000_000


def look_at_prompts(name: str, field: str, asked_by: str, named_by: str = "data.field") -> DataError | None:
    """What is wrong with a prompts file as far as its first rows show; None if nothing, or if it isn't a local file."""
    suffix = os.path.splitext(name)[1].lower()
    path = Path(os.path.expanduser(name))
    if not os.path.exists(path):
        if suffix not in SUFFIXES and not name.startswith((".", "/", "~")):
            return None  # a datasets name
        return DataError(f"{asked_by}: there is no file {name!r}.{_near_file(path)}")
    if os.path.isdir(path):
        return (
            None if not name.startswith(".") else DataError(f"{asked_by}: {name!r} is a folder. Give a file inside it.")
        )
    if suffix not in SUFFIXES:
        return DataError(
            f"{asked_by}: {name!r} is of no known kind. Give a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file."
        )
    try:
        if os.path.getsize(path) == 0:
            return DataError(f"{asked_by}: {name!r} is empty. Give a file with one prompt per row.")
        return _look_at_rows(_first_rows(path, suffix), name, field, asked_by, named_by)
    except (OSError, ValueError, csv.Error) as error:
        return DataError(f"{asked_by}: {name!r} can't be read: {error}. Repair the file, or save it again as UTF-8.")


def _first_rows(path: Path, suffix: str) -> list[Any] | None:
    """The first rows; None where they can't be had cheaply."""
    if suffix == ".parquet" or (suffix == ".json" and os.path.getsize(path) > MAX_JSON_BYTES):
        return None
    with path.open(encoding="utf-8-sig", newline="") as stream:
        if suffix == ".csv":
            return list(islice(csv.DictReader(stream), FIRST_ROWS))
        if suffix == ".jsonl":
            return [
                _json_line(line, number) for number, line in enumerate(islice(stream, FIRST_ROWS), 1) if line.strip()
            ]
        try:
            rows = json.load(stream)
        except json.JSONDecodeError:  # json lines are often called .json
            stream.seek(0)
            rows = [
                _json_line(line, number) for number, line in enumerate(islice(stream, FIRST_ROWS), 1) if line.strip()
            ]
        return rows[:FIRST_ROWS] if isinstance(rows, list) else None


def _json_line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is not JSON ({error.msg})") from error


def _look_at_rows(rows: list[Any] | None, name: str, field: str, asked_by: str, named_by: str) -> DataError | None:
    if rows is None:
        return None
    if not rows:
        return DataError(f"{asked_by}: {name!r} has no rows. Give a file with one prompt per row.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            kind = type(row).__name__
            return DataError(
                f"{asked_by}: row {number} of {name!r} is a {kind}, not a set of columns such as {{{field!r}: ...}}."
            )
        if field not in row:
            columns = ", ".join(str(column) for column in row)
            return DataError(
                f"{asked_by}: row {number} of {name!r} has no column {field!r}. "
                f"{'Set data.field to' if named_by == 'data.field' else f'Name in {named_by}'} one of: {columns}."
            )
    return None


def _near_file(path: Path) -> str:
    try:
        names = sorted(os.listdir(path.parent))
    except (OSError, ValueError):
        return f" There is no folder {str(path.parent)!r} either; paths are relative to the current folder."
    near = near_match(path.name, names)
    return f" Did you mean {str(path.parent / near)!r}?" if near else " Paths are relative to the current folder."
