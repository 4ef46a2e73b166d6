"""No warning of marl's names a file of marl: Python's own format, from a script, wherever in a run the reason lies."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from marl_core import MarlDeprecationWarning, MarlWarning
from marl_core.errors import warn
from marl_core.testing import write_tiny_model

SCRIPT = """\
from marl_core import Runner, Strategy, hookimpl, load_config
from marl_core.testing import fake_rollout


class Meddles(Strategy):
    @hookimpl
    def marl_evaluation(self):
        import torch
        torch.set_default_dtype(torch.float64)

    @hookimpl
    def marl_run_failed(self):
        raise ValueError("fails while failing")


config = load_config("run.yaml")
config = type(config).model_validate({**config.model_dump(by_alias=True), "observers": [Meddles()]})
runner = Runner(config)
for stats in runner.steps():
    fake_rollout().captured
    if stats.step == 2:
        break
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "base")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"text {i}"}) + "\n" for i in range(4)))
    (tmp_path / "mine.py").write_text(
        "from marl_core import reward_context\n"
        "calls = []\n"
        "def score(completions, **columns):\n"
        "    calls.append(1)\n"
        "    reward_context().log_extra('column', [1] * (len(completions) + 1))\n"
        "    return [1.0] * len(completions)\n"
    )
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "model": {"path": "base", "dtype": "float32"},
                "reference": "disabled-adapter",
                "reward": {"use": "function", "target": "mine.py:score"},
                "data": {"prompts": "prompts.jsonl"},
                "eval": {"prompts": "prompts.jsonl"},
                "sampling": {"max_new_tokens": 4, "top_k": 5},
                "ppo": {"steps": 2, "batch": 2, "minibatch": 2, "epochs": 1},
                "run": {"device": "cpu"},
            }
        )
    )
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=folder)


def paths_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if "/marl_core/" in line or "/marl_plugins/" in line]


def test_a_script_is_told_of_its_own_lines(folder: Path) -> None:
    done = python(folder, "script.py")
    assert done.returncode == 0, done.stderr
    for words in (
        "top_k",
        "got the same score",
        "default dtype",
        "fails while failing",
        "log_extra('column'",
        "Rollout.captured",
    ):
        (line,) = [line for line in done.stderr.splitlines() if words in line and "Warning: " in line]
        assert line.startswith((f"{folder}/script.py:", "script.py:")), line
    assert not paths_in(done.stderr)


def test_the_command_line_names_no_file(folder: Path) -> None:
    done = python(folder, "-m", "marl_core.cli", "run", "run.yaml")
    assert done.returncode == 0, done.stderr
    for words in ("top_k", "got the same score", "log_extra('column'"):
        (line,) = [line for line in done.stderr.splitlines() if words in line]
        assert line.startswith("marl: warning: ")
    assert not paths_in(done.stderr)


def test_a_warning_made_an_error_ends_the_command_with_its_sentence(folder: Path) -> None:
    code = "import sys, warnings; from marl_core.cli.app import main; from marl_core import MarlWarning; "
    code += "warnings.simplefilter('error', MarlWarning); sys.exit(main(['run', 'run.yaml', '-q']))"
    done = python(folder, "-c", code)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "top_k" in line]
    assert line.startswith("marl: ")
    assert "treat as an error" in line
    assert "a bug in marl" not in done.stderr


def filename_of(warning_calls: object) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warning_calls()  # type: ignore[operator]
    (one,) = caught
    return one.filename


def test_in_a_thread_that_marl_made_no_file_is_named() -> None:
    def by_marl() -> None:
        exec(
            compile("warn('from a thread')", "/x/marl_core/inside.py", "exec"),
            {"warn": warn, "__name__": "marl_core.inside"},
        )

    def in_a_thread() -> None:
        code = "import threading\nthread = threading.Thread(target=warn, args=('of a thread',))\nthread.start()\nthread.join()"
        exec(compile(code, "/x/marl_core/inside.py", "exec"), {"warn": warn, "__name__": "marl_core.inside"})

    assert filename_of(by_marl) == __file__
    assert filename_of(in_a_thread) == "marl"
    with ThreadPoolExecutor(1) as pool:
        assert filename_of(lambda: pool.submit(warn, "of a pool").result()) == "marl"


def test_a_thread_of_the_caller_s_own_is_the_caller_s() -> None:
    def theirs() -> None:
        warn("mine")

    def started() -> None:
        thread = threading.Thread(target=theirs)
        thread.start()
        thread.join()

    assert filename_of(started) == __file__


@pytest.mark.parametrize("category", [MarlWarning, MarlDeprecationWarning])
def test_said_once_for_each_line(category: type[Warning]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            warn("the same", category)
    assert len(caught) == 1
