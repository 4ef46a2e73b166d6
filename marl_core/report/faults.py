"""What can go wrong with a run folder that a report reads, and with the file it is written to: said as such."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from marl_core.errors import DataError, MarlError
from marl_core.store.files import write_text


@contextmanager
def damage_told(folders: Sequence[str | Path]) -> Iterator[None]:
    """DataError naming these run folders for whatever goes wrong in the block: damaged numbers may break a page or a table anywhere."""
    try:
        yield
    except MarlError:
        raise
    except Exception as error:
        raise DataError(
            f"report: a file in {', '.join(map(str, folders))} is damaged or can't be read ({type(error).__name__}: {error}). "
            "Each line of steps.jsonl, evals.jsonl and samples.jsonl is one JSON object; preflight.json and provenance.json are one each."
        ) from error


def write_output(file: Path, text: str) -> None:
    """Write what was made of runs; DataError when the file can't be written."""
    try:
        write_text(file, text)
    except (OSError, ValueError) as error:
        raise DataError(f"report: {file} can't be written: {error}. Give another path.") from error
