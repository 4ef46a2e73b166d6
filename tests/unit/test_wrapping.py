"""Sentences on a terminal break between words, in a pipe they don't break."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from marl_core import MarlWarning, Plan, RunConfig
from marl_core.cli import tables
from marl_core.cli.app import main
from marl_core.cli.wrapping import wrapped
from marl_core.errors import warn
from marl_core.plan.describe import explain

MakeConfig = Callable[..., RunConfig]
PATH = "/a/folder/with/a/long/name" * 4


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")


def whole_words(said: str, asked: str) -> None:
    """Every word of `asked` stands whole on some line, and no line could have held the next word."""
    assert said.split() == asked.split()
    assert all(len(line) <= 60 or " " not in line.strip() for line in said.splitlines())
    assert len(said.splitlines()) > 1


def test_a_sentence_on_a_terminal() -> None:
    asked = f"data.prompts: there is no file in {PATH} that holds a value, so nothing can be read. Give another one."
    whole_words(wrapped(asked, Terminal()), asked)
    assert wrapped(asked, io.StringIO()) == asked
    assert wrapped("  " + "word " * 30, Terminal()).splitlines()[1].startswith("  word")
    assert wrapped("short\n\n  indented", Terminal()) == "short\n\n  indented"


def test_the_plan_at_a_terminal(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        shown = Console(file=io.StringIO(), width=60, force_terminal=terminal, color_system=None, highlight=False)
        monkeypatch.setattr(tables, "console", lambda shown=shown: shown)
        plan = Plan.of(make_config(policy={"dropout": 0.1}))
        tables.show_plan(plan)
        tables.show_notes(["a note " * 20])
        tables.show_unseen("a value " * 20)
        said = shown.file.getvalue()  # type: ignore[attr-defined]
        sentences = explain(plan)
        assert sentences
        for sentence in [*sentences, "a note " * 20, "note: " + "a value " * 20]:
            if terminal:
                assert sentence not in said or len(sentence) <= 60
                assert sentence.strip() in " ".join(said.split())
            else:
                assert sentence in said


def test_an_error_and_a_warning_at_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", stream)
        assert main(["check", str(tmp_path / "none.yaml")]) == 2
        said = stream.getvalue()
        assert (len(said.strip().splitlines()) > 1) == stream.isatty()
        assert str(tmp_path / "none.yaml") in said


def test_warnings_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from marl_core.cli.warning_lines import warnings_in_one_line

    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("warnings.filters", [("always", None, MarlWarning, None, 0)])
    with warnings_in_one_line():
        warn("a warning of many words " * 8)
    whole_words(stream.getvalue(), "marl: warning: " + "a warning of many words " * 8)
