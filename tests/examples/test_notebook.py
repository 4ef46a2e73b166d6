"""The notebook runs from its first cell to its last, for two steps on a tiny model, and shows what its stored outputs show."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import nbformat
import pytest

pytestmark = pytest.mark.examples

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "notebook"


def shown(cell: Any) -> list[str]:
    """What a cell shows: printed lines without their numbers, and the kinds of its results."""
    kinds = []
    for output in cell.get("outputs", []):
        lines = output.get("text", "").splitlines() if output.output_type == "stream" else sorted(output.data)
        kinds += [re.sub(r"-?\d[\d.]*", "0", line) for line in lines]
    return list(dict.fromkeys(kinds))


def read_stored() -> Any:
    return nbformat.read(FOLDER / "short_words.ipynb", as_version=4)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory, wide_folder: str) -> Any:
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "examples").symlink_to(EXAMPLES)
    execute: Any = runpy.run_path(str(FOLDER / "make_notebook.py"))["execute"]
    return execute(folder, MODEL=wide_folder, STEPS=2)


def test_it_shows_what_is_stored(executed: Any) -> None:
    stored = read_stored()
    for now, then in zip(executed.cells, stored.cells, strict=True):
        if now.cell_type == "code" and "runner.generate" not in now.source:  # sampled texts
            without_report = [kind for kind in shown(now) if kind != "text/html"]
            expected = [kind for kind in shown(then) if not re.match(r"step (?!0)", kind)]
            assert [line for line in without_report if line != "text/plain"] == [
                line for line in expected if line != "text/plain"
            ], now.source


def test_the_report_is_inside(executed: Any) -> None:
    (frame,) = [
        output.data["text/html"]
        for cell in executed.cells
        for output in cell.get("outputs", [])
        if "text/html" in output.get("data", {})
    ]
    assert frame.startswith("<iframe srcdoc=")
    assert "short_words" in frame


def test_no_cell_warns_or_fails(executed: Any) -> None:
    for cell in executed.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text


def test_the_stored_notebook_was_run_from_top_to_bottom() -> None:
    stored = read_stored()
    counts = [cell.execution_count for cell in stored.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_its_pictures_are_small() -> None:
    """A repository keeps every version of a notebook: 60 kB a picture are enough to read curves."""
    pictures = [
        output.data["image/png"]
        for cell in read_stored().cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert pictures
    assert all(len(picture) < 60_000 for picture in pictures)
