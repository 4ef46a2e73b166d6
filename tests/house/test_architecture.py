"""docs/architecture.md is the house as built: its pictures are drawn from the code, and a step goes the way that they show."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from marl_core import Runner

ROOT = Path(__file__).parents[2]
HOUSE: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "make_architecture.py"))
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", HOUSE["FILES"])
def test_the_pictures_are_up_to_date(name: str) -> None:
    drawn = HOUSE["FILES"][name]()
    assert drawn == (ROOT / "docs" / "figures" / name).read_text(encoding="utf-8"), (
        "run: python docs/make_architecture.py"
    )
    assert f"(figures/{name})" in PAGE


@contextmanager
def first_calls(calls: list[tuple[str, str]]) -> Iterator[None]:
    """Functions of the core in the order in which they are first called: file and qualified name."""
    core = str(ROOT / "marl_core") + "/"

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(core):
            call = (code.co_filename.removeprefix(core), code.co_qualname)
            if call not in calls:
                calls.append(call)

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


def test_a_step_goes_through_the_stations(make_config: Any) -> None:
    runner = Runner(make_config(speed={"capture": False}))
    runner.prepare()
    calls: list[tuple[str, str]] = []
    with first_calls(calls):
        runner.step(runner.prompts())
    stations = [(station.file, station.function) for station in HOUSE["STATIONS"]]
    assert [call for call in calls if call in stations] == stations


def test_every_file_that_the_page_names_is_there() -> None:
    named = set(re.findall(r"`([\w/]+\.py)`", PAGE))
    places = [ROOT, ROOT / "marl_core", ROOT / "docs", ROOT / "plugins"]
    assert len(named) > 20
    assert [name for name in sorted(named) if not any((place / name).is_file() for place in places)] == []
