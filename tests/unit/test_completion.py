"""Shell completion, as a shell asks for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def asked(words: str, **more: str) -> str:
    environment = {**os.environ, "_MARL_COMPLETE": "complete_bash", "COMP_WORDS": words, **more}
    environment["COMP_CWORD"] = str(len(words.split(" ")) - 1)
    done = subprocess.run(
        [sys.executable, "-m", "marl_core.cli"], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("marl ch", {"check", "chat"}),
        ("marl merge --dty", {"--dtype"}),
        ("marl merge --dtype b", {"bfloat16"}),
        ("marl import ", {"llamafactory", "trl-args"}),  # a command of another package
    ],
)
def test_commands_options_and_choices(words: str, found: set[str]) -> None:
    assert set(asked(words).split()) == found


def test_it_is_offered() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "marl_core.cli", "--show-completion", "bash"],
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},  # whatever shell runs the tests
        capture_output=True,
        text=True,
        check=False,
    )
    assert "_MARL_COMPLETE=complete_bash" in done.stdout
