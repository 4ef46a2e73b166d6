"""A reward function that fails says where in the user's file, and which columns it was given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from marl_core import PluginError, Rollout, raised_from
from marl_core.ppo.budget import PassLimits
from marl_core.ppo.rewards import score_all
from marl_core.ppo.roles import RewardSource
from marl_core.testing import fake_rollout
from marl_plugins.reward_function import wrap

CODE = """import torch
def helper(texts):
    return torch.zeros(2).reshape(len(texts), 7)
def in_torch(prompts, completions, **columns):
    return helper(completions)
def by_name(completions, label):
    return [1.0 / len(())] * len(completions)
async def later(completions):
    raise ValueError("no")
def asks_too_much(completions, answer):
    return [0.0 for _ in completions]
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(CODE)
    return tmp_path / "rewards.py"


def rollout() -> Rollout:
    """With two columns beside the prompt."""
    found = fake_rollout()
    rows = [{"prompt": "a", "label": 1, "source": "x"} for _ in range(len(found))]
    return replace(found, prompts=replace(found.prompts, rows=rows))


def failure(target: str) -> PluginError:
    bank: Any = None
    with pytest.raises(PluginError) as caught:
        score_all(bank, [RewardSource("r", 1.0, wrap(target, {}), target)], rollout(), PassLimits(2))
    return caught.value


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "in_torch",  # the last line of the user's, not torch's
            "It was raised from rewards.py, line 3, in helper: `return torch.zeros(2).reshape(len(texts), 7)`. "
            "The function was given prompts, completions, completion_ids and the data's columns label, source.",
        ),
        ("by_name", "line 7, in by_name: `return [1.0 / len(())] * len(completions)`"),
        ("by_name", "The function was given completions and the data's columns label."),
        ("later", 'ValueError: no. It was raised from rewards.py, line 9, in later: `raise ValueError("no")`'),
        ("later", "The function was given completions and no columns of the data."),
    ],
)
def test_the_line_and_the_columns_are_named(file: Path, name: str, said: str) -> None:
    error = failure(f"{file.name}:{name}")
    assert said in str(error)
    assert error.__cause__ is not None


def test_a_column_that_the_data_lacks_has_no_line(file: Path) -> None:
    said = str(failure(f"{file.name}:asks_too_much"))
    assert "missing 1 required positional argument: 'answer'. The function was given completions and no columns" in said


def test_a_file_that_fails_on_import_is_named_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("import math\nscore = math.sqrt(-1)\n")
    with pytest.raises(PluginError, match=r"from broken\.py, line 2: `score = math\.sqrt\(-1\)`"):
        wrap("broken.py:score", {})


def test_an_error_without_any_of_the_users_code_has_no_place() -> None:
    assert raised_from(ValueError("no")) == ""
