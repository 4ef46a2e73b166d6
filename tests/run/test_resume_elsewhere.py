"""A run folder used from another folder than the one that its relative paths were meant from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marl_core import Runner
from marl_core.cli.app import main


def test_a_missing_file_is_told_with_the_folder_the_run_was_started_in(
    make_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    other.mkdir()
    (other / "word.py").write_text("", encoding="utf-8")  # alike in nothing but its ending
    (home / "reward.py").write_text(
        "def f(completions):\n    return [1.0 * len(c) for c in completions]\n", encoding="utf-8"
    )
    monkeypatch.chdir(home)
    reward = [{"use": "function", "target": "reward.py:f"}]
    Runner(make_config(reward=reward, run={"folder": "runs/a"}, ppo={"steps": 1})).train()
    monkeypatch.chdir(other)
    more = ["--set", "ppo.steps=2"]
    assert main(["run", str(home / "runs" / "a"), "--resume", "--override", *more]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "there is no file 'reward.py'" in said
    assert f"The run was started in {home}" in said.replace("- ", "-")
    assert "Did you mean" not in said
