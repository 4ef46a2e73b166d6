"""marl's warnings: one line on the command line, ordinary warnings of the caller's own line in Python."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from marl_core import MarlDeprecationWarning, MarlWarning, RunConfig, Runner
from marl_core.cli.warning_lines import warnings_in_one_line
from marl_core.errors import PluginWarning, warn
from marl_core.testing import write_tiny_model


@pytest.mark.parametrize("category", [MarlWarning, MarlDeprecationWarning, PluginWarning])
def test_one_line_without_a_path(category: type[Warning], capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(), warnings_in_one_line():
        warnings.simplefilter("always")
        warn("something\nin two lines", category)
    assert capsys.readouterr() == ("", "marl: warning: something in two lines\n")


def test_others_are_shown_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="theirs"), warnings_in_one_line():
        warnings.warn("theirs", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == ""


def test_it_is_python_s_again_afterwards() -> None:
    before = warnings.showwarning
    with pytest.raises(ZeroDivisionError), warnings_in_one_line():
        raise ZeroDivisionError
    assert warnings.showwarning is before


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run with a warning before its first step (top_k) and one in it (all scores the same)."""
    write_tiny_model(tmp_path / "base")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"text {i}"}) + "\n" for i in range(4)))
    (tmp_path / "same.py").write_text("def score(completions, **columns):\n    return [1.0 for _ in completions]\n")
    file = tmp_path / "run.yaml"
    file.write_text(
        json.dumps(
            {
                "model": {"path": str(tmp_path / "base"), "dtype": "float32"},
                "reference": "disabled-adapter",
                "reward": {"use": "function", "target": f"{tmp_path}/same.py:score"},
                "data": {"prompts": f"{tmp_path}/prompts.jsonl"},
                "sampling": {"max_new_tokens": 4, "top_k": 5},
                "ppo": {"steps": 2, "batch": 2, "minibatch": 2, "epochs": 1},
                "observers": ["console"],
                "run": {"device": "cpu"},
            }
        )
    )
    return file


def test_python_users_are_told_of_their_own_line(config: Path) -> None:
    settings = RunConfig.model_validate({**json.loads(config.read_text()), "observers": []})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MarlWarning)
        runner = Runner(settings)
        for _ in runner.steps():
            pass
    ours = [each for each in caught if issubclass(each.category, MarlWarning)]
    assert {Path(each.filename).name for each in ours} == {Path(__file__).name}
    assert any("top_k" in str(each.message) for each in ours)
    assert any("got the same score" in str(each.message) for each in ours)


def marl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "marl_core.cli", *arguments], capture_output=True, text=True, check=True
    )


def test_quiet_leaves_the_warnings(config: Path) -> None:
    done = marl("run", str(config), "--quiet")
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if "got the same score" in line]
    assert len(said) == 1
    assert said[0].startswith("marl: warning: ")
    assert "MarlWarning" not in done.stderr
    assert "warnings.warn" not in done.stderr


def test_beside_a_progress_bar_the_line_stands_by_itself(config: Path) -> None:
    """On a terminal, where the bar is redrawn below whatever is printed."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "400", "TERM": "xterm"}
    with subprocess.Popen(
        [sys.executable, "-m", "marl_core.cli", "run", str(config)], stdout=theirs, stderr=theirs, env=environment
    ) as running:
        os.close(theirs)
        output = b""
        while running.poll() is None or select.select([ours], [], [], 0)[0]:
            try:
                output += os.read(ours, 65536) if select.select([ours], [], [], 0.1)[0] else b""
            except OSError:  # the other end is closed
                break
    os.close(ours)
    assert running.returncode == 0
    lines = [line for line in output.decode().splitlines() if "got the same score" in line]
    assert len(lines) == 1
    before, _, _ = lines[0].partition("marl: warning: ")
    visible = before.rpartition("\x1b[2K")[2].rpartition("\r")[2]
    assert visible == "", f"something stands before it in its line: {lines[0]!r}"
