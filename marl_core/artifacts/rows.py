"""Rows of a prompts file or data set: `marl check` looks at the first ones, a run reads them all, by the same readers.

Read by hand, row by row. datasets' own readers are too heavy for a check, and they make one type of each column: a file in which some
prompts are texts and others chats is an error to them, a key that a message lacks comes back as None, and no error names a line.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from marl_core.artifacts.hub import hub_read
from marl_core.errors import DataError, near_match
from marl_core.logs import LOADING, logger

Row = Mapping[str, Any]

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
SUFFIX_LIST = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
SAVED_MARKS = ("state.json", "dataset_dict.json", "dataset_info.json")
"""Files that datasets writes at the top of a data set that it saves."""
DATA_SUFFIXES = tuple(
    kind + packed for kind in (*SUFFIXES, ".ndjson", ".tsv", ".arrow") for packed in ("", ".gz", ".zst", ".bz2", ".xz")
)
"""How files end that a folder must hold to be a data set. Pictures and sounds are no prompts."""
MOST_ENTRIES = 10_000
"""Files and folders that may lie in the folder of a data set: datasets looks at each, and a home folder would take it an hour."""
DATA_FOLDERS = ("data", "train", "test", "valid", "dev", "eval")
PREVIEW_ROWS = 20
COLUMN_ROWS = 1000
"""Rows in which a column that a reward function requires is looked for."""
PARQUET_BATCH = 1000
MAX_JSON_BYTES = 20_000_000


def read_rows(
    source: str,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    asked_by: str = "data.prompts",
    limit: int | None = None,
) -> list[Row]:
    """Rows of a .json, .jsonl, .csv or .parquet file, or of a data set by name or folder, with `split`, `subset` and `revision`.

    Only the first `limit` of them are read where there is one. DataError naming `asked_by` and, where there is one, the row or line.
    """
    path = Path(os.path.expanduser(source))
    if is_data_set(source):
        if path.is_dir():
            problem = folder_problem(source)
            if problem is not None:
                raise DataError(f"{asked_by}: {problem}")
        return _from_datasets(source, split, subset, revision, asked_by, limit)
    if not path.exists():
        raise DataError(f"{asked_by}: there is no file {source!r}.{_near_file(path)}")
    rows = _read(path, source, asked_by, limit)
    if not rows:
        raise _no_rows(source, asked_by)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise _no_row(row, number, source, asked_by)
    return rows


def is_columnar(source: str) -> bool:
    """Whether the rows come from columns (parquet, a data set), so that every struct has the keys of all others."""
    return Path(source).suffix.lower() not in _READERS


def is_data_set(source: str) -> bool:
    """Whether a source isn't a file but a data set, by its name on the hub or its folder."""
    path = Path(os.path.expanduser(source))
    return path.suffix.lower() not in SUFFIXES or path.is_dir()


def folder_problem(source: str) -> str | None:
    """Why a folder can't be a data set, told from names near its top; None where it may be one.

    datasets itself would go through everything below a folder, for minutes, before it says so.
    """
    folder = Path(os.path.expanduser(source))
    try:
        if is_saved_data_set(folder):
            return None
        if any(_holds_data(place) for place in (folder, *_splits(folder))):
            if not _is_larger(folder, MOST_ENTRIES):
                return None
            return (
                f"{source!r} is a folder with more than {MOST_ENTRIES:,} files and folders in it, which datasets would all go through. "
                f"Give a {SUFFIX_LIST} file in it."
            )
    except OSError as error:
        return f"{source!r} can't be read: {error.strerror or error}. Give a {SUFFIX_LIST} file."
    return (
        f"{source!r} is a folder, and neither a saved data set nor one of data files. Give a {SUFFIX_LIST} file in it."
    )


def is_saved_data_set(folder: Path) -> bool:
    """Whether datasets' `save_to_disk` wrote it."""
    return any((folder / name).is_file() for name in SAVED_MARKS)


def _is_larger(folder: Path, most: int) -> bool:
    """Whether more than `most` files and folders lie in it, on any level; no further ones are counted."""
    count = 0
    for _, folders, files in os.walk(folder):
        count += len(folders) + len(files)
        if count > most:
            return True
    return False


def _splits(folder: Path) -> Iterator[Path]:
    """Folders in which a data set keeps its files: `data`, and those named by a split."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.lower().startswith(DATA_FOLDERS) and entry.is_dir()]
    return (folder / name for name in names)


def _holds_data(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(DATA_SUFFIXES) for entry in entries)


def is_read_whole(source: str) -> bool:
    """Whether no few rows of a file can be had cheaply: it is one large JSON list."""
    path = Path(os.path.expanduser(source))
    return path.suffix.lower() == ".json" and os.path.getsize(path) > MAX_JSON_BYTES


def first_columns(source: str, limit: int | None = None) -> frozenset[str] | None:
    """Columns that any of the first rows of a local file has (of a parquet file all columns); None where they can't be had cheaply."""
    path = Path(os.path.expanduser(source))
    try:
        if is_data_set(source) or is_read_whole(source):
            return None
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet

            return frozenset(pyarrow.parquet.read_schema(path).names)
        rows = _read(path, source, "", min(limit or COLUMN_ROWS, COLUMN_ROWS))
    except (OSError, ValueError, DataError):
        return None  # told where the file is looked at
    return frozenset(str(name) for row in rows if isinstance(row, Mapping) for name in row) or None


def look_at_prompts(
    name: str, field: str, asked_by: str, named_by: str = "data.field", limit: int | None = None
) -> DataError | None:
    """What is wrong with a prompts file as far as its first rows (`limit` at most) show; None if nothing, or if it isn't a local file.

    A parquet file and a .json file of more than MAX_JSON_BYTES aren't looked into: no few rows of them can be had cheaply.
    """
    path = Path(os.path.expanduser(name))
    suffix = path.suffix.lower()
    if not os.path.exists(path):
        if suffix not in SUFFIXES and not name.startswith((".", "/", "~")):
            return None  # a datasets name
        return DataError(f"{asked_by}: there is no file {name!r}.{_near_file(path)}")
    if os.path.isdir(path):
        problem = folder_problem(name)
        return DataError(f"{asked_by}: {problem}") if problem is not None else None
    if suffix not in SUFFIXES:
        return DataError(f"{asked_by}: {name!r} is of no known kind. Give a {SUFFIX_LIST} file.")
    try:
        if os.path.getsize(path) == 0:
            return _no_rows(name, asked_by)
        if suffix not in _READERS or is_read_whole(name):
            return None
        rows = _read(path, name, asked_by, min(limit or PREVIEW_ROWS, PREVIEW_ROWS))
    except OSError as error:
        return _unreadable(name, asked_by, error)
    except DataError as error:
        return error
    return _wrong_row(rows, name, field, asked_by, named_by)


def _read(path: Path, source: str, asked_by: str, limit: int | None) -> list[Any]:
    """The first `limit` rows of a file, all of them without a limit."""
    try:
        if path.suffix.lower() == ".parquet":
            return list(islice(_parquet(path), limit))
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return list(islice(_READERS[path.suffix.lower()](stream), limit))
    except UnicodeDecodeError as error:
        raise DataError(f"{asked_by}: {source!r} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise _unreadable(source, asked_by, error) from error


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(PARQUET_BATCH):
            yield from batch.to_pylist()


def _jsonl(stream: TextIO) -> Iterator[Any]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON ({error.msg}, column {error.colno})") from error


def _json(stream: TextIO) -> Iterator[Any]:
    try:
        data = json.load(stream)
    except json.JSONDecodeError:  # JSON lines are often called .json
        stream.seek(0)
        yield from _jsonl(stream)
        return
    if not isinstance(data, list):
        raise ValueError(f"it holds a {type(data).__name__}, not a list of rows")
    yield from data


def _csv(stream: TextIO) -> Iterator[Any]:
    for number, row in enumerate(csv.DictReader(stream, strict=True), 1):
        if None in row:
            raise ValueError(f"row {number} has more cells than the header has columns")
        yield row


_READERS: dict[str, Callable[[TextIO], Iterator[Any]]] = {".json": _json, ".jsonl": _jsonl, ".csv": _csv}


def _from_datasets(
    source: str, split: str, subset: str | None, revision: str | None, asked_by: str, limit: int | None
) -> list[Row]:
    import datasets

    logger(LOADING).info("data set %s, split %s", source, split)
    try:
        with hub_read(source, asked_by, revision):
            folder = Path(os.path.expanduser(source))
            if (folder / "state.json").is_file():  # load_dataset refuses what save_to_disk wrote
                return list(islice(datasets.load_from_disk(str(folder)), limit))
            if (folder / "dataset_dict.json").is_file():
                return list(islice(datasets.load_from_disk(str(folder))[split], limit))
            return list(islice(datasets.load_dataset(source, subset, split=split, revision=revision), limit))
    except DataError:
        raise
    except Exception as error:
        selection = f"split {split!r}" + (f", subset {subset!r}" if subset else "")
        first = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"{asked_by}: {source!r} is no {SUFFIX_LIST} file, and datasets could not load it with {selection} "
            f"({type(error).__name__}: {first}). Check the name, data.split and data.subset."
        ) from error


def _wrong_row(rows: list[Any], name: str, field: str, asked_by: str, named_by: str) -> DataError | None:
    """A row that is none, or a column that no row has: one that a few rows lack is told with the other rows' faults."""
    if not rows:
        return _no_rows(name, asked_by)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            return _no_row(row, number, name, asked_by)
    if any(field in row for row in rows):
        return None
    columns = list(dict.fromkeys(str(column) for row in rows for column in row))
    near = near_match(field, columns)
    return DataError(
        f"{asked_by}: row 1 of {name!r} has no column {field!r}. "
        f"{'Set data.field to' if named_by == 'data.field' else f'Name in {named_by}'} one of: {', '.join(columns) or 'nothing'}."
        f"{f' Did you mean {near!r}?' if near else ''}"
    )


def _no_rows(name: str, asked_by: str) -> DataError:
    return DataError(f"{asked_by}: {name!r} holds no rows. Give a file with one prompt per row.")


def _no_row(row: Any, number: int, name: str, asked_by: str) -> DataError:
    kind = type(row).__name__
    return DataError(
        f"{asked_by}: row {number} of {name!r} is a {kind}, not a set of columns such as {{'prompt': ...}}."
    )


def _unreadable(name: str, asked_by: str, error: Exception) -> DataError:
    return DataError(f"{asked_by}: {name!r} can't be read: {error}. Repair the file, or save it again.")


def _near_file(path: Path) -> str:
    try:
        names = sorted(os.listdir(path.parent))
    except (OSError, ValueError):
        return f" There is no folder {str(path.parent)!r} either; paths are relative to the current folder."
    by_stem = {Path(name).stem: name for name in sorted(names, key=lambda name: Path(name).suffix == path.suffix)}
    near = by_stem.get(near_match(path.stem, by_stem, cutoff=0.75) or "")  # an ending is like an ending in any name
    return f" Did you mean {str(path.parent / near)!r}?" if near else " Paths are relative to the current folder."
