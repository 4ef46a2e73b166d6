"""Every number that a step writes has a note on what it is and what is normal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from marl_core import Runner
from marl_core.report.metric_notes import NOTES, note_of


def test_every_metric_of_a_step_has_a_note(make_config: Callable[..., Any]) -> None:
    stats = next(iter(Runner(make_config()).steps()))
    assert [name for name in stats.metrics if note_of(name) is None] == []
    written = {note.name for name in stats.metrics if (note := note_of(name))}
    assert {note.name for note in NOTES} == written, "a note tells of a metric that is no longer written"


def test_a_number_that_is_not_normal_has_a_remark() -> None:
    explained = note_of("val/explained_var")
    assert explained is not None
    assert "worse than the mean" in explained.remark(-1.5, 20)
    assert [explained.remark(value, 20) for value in (0.0, 0.7, None)] == ["", "", ""]


@pytest.mark.parametrize(("name", "value"), [("val/clipfrac", 0.871), ("val/explained_var", -0.342)])
def test_a_value_function_that_just_began_has_none(name: str, value: float) -> None:
    note = note_of(name)
    assert note is not None
    assert [bool(note.remark(value, steps)) for steps in (1, 19, 20)] == [False, False, True]


@pytest.mark.parametrize("note", NOTES, ids=lambda note: note.name)
def test_a_bound_says_what_lies_beyond_it(note: Any) -> None:
    assert bool(note.below) == (note.low is not None)
    assert bool(note.above) == (note.high is not None)
    assert note.about.endswith(".")
    assert note.normal.endswith(".")


def test_what_a_reward_logged_has_no_note() -> None:
    assert note_of("my/number") is None
    assert note_of("reward/length") is note_of("reward/NAME")
    assert note_of("perf/seconds_generate") is note_of("perf/seconds_PHASE")
