"""The data's columns beside a sample: short, without secrets, without what stands there already."""

from __future__ import annotations

import json

import pytest

from marl_core.ppo.data_columns import MAX_CHARACTERS, MAX_COLUMNS, shown_row
from marl_core.ppo.types import Prompts


def test_the_answer_stands_beside_its_prompt() -> None:
    row = {"question": "8 plus 5", "answer": 13, "note": "", "none": None}
    assert shown_row(row, "8 plus 5") == {"answer": 13}
    assert shown_row({"text": "long and cut", "answer": "x"}, "cut") == {"answer": "x"}
    chat = [{"role": "user", "content": "8 plus 5"}]
    assert shown_row({"messages": chat, "answer": 13}, [{"role": "system", "content": "Add."}, *chat]) == {"answer": 13}


def test_it_is_bounded() -> None:
    row = {f"column{i}": "x" * 10_000 for i in range(100)}
    found = shown_row(row)
    assert len(found) == MAX_COLUMNS
    assert {len(value) for value in found.values()} == {MAX_CHARACTERS}
    assert len(shown_row({"a": [{"b": "x" * 1000}]})["a"]) == MAX_CHARACTERS


def test_it_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    row = {"url": "https://me:secret@host/", "nested": {"key": "correct-horse-battery"}}
    assert "secret@" not in json.dumps(shown_row(row))
    assert "horse" not in json.dumps(shown_row(row))


def test_prompts_without_texts_have_columns() -> None:
    assert Prompts.of([[1, 2]], 0, [{"answer": 3}]).shown_row(0) == {"answer": 3}
