"""Who started a run: the command without its secrets, the commit, and until when it was seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from marl_core.store import sessions

SECRET = "correct-horse-battery"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["run", "run.yaml", "--set", "ppo.steps=4"], ["run", "run.yaml", "--set", "ppo.steps=4"]),
        (["--hub-token", SECRET, "x"], ["--hub-token", "[redacted]", "x"]),
        ([f"--api_key={SECRET}"], ["--api_key=[redacted]"]),
        (["--set", f"reward.0.password={SECRET}"], ["--set", "reward.0.password=[redacted]"]),
        ([f"https://me:{SECRET}@host/x"], ["https://[redacted]@host/x"]),
        (["sampling.max_new_tokens=64", "model.tokenizer=x"], ["sampling.max_new_tokens=64", "model.tokenizer=x"]),
        (["--max-tokens", "64"], ["--max-tokens", "64"]),
    ],
)
def test_no_secret_of_a_command_is_written(given: list[str], shown: list[str]) -> None:
    assert sessions.without_secrets(given) == shown


def test_an_installed_command_goes_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "__main__", type(sys)("__main__"))
    monkeypatch.setattr(sys, "argv", [str(Path(sys.executable).parent / "marl"), "run", "x.yaml"])
    assert sessions.command() == ["marl", "run", "x.yaml"]
    monkeypatch.setattr(sys, "argv", ["scripts/train.py"])
    assert sessions.command() == ["scripts/train.py"]


def test_the_commit_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert sessions.session("start", 0, {})["git"] is None

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "a").write_text("1", encoding="utf-8")
    git("add", "a")
    git("commit", "-m", "a")
    assert sessions.session("start", 0, {})["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a").write_text("2", encoding="utf-8")
    assert sessions.session("start", 0, {})["git"]["dirty"] is True


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert sessions.session("start", 0, {})["git"] is None


def test_a_damaged_record_has_no_sessions(tmp_path: Path) -> None:
    for text in ("{", "[]", "{}", '{"sessions": 3}', '{"sessions": [3]}'):
        (tmp_path / "provenance.json").write_text(text, encoding="utf-8")
        assert sessions.earlier_sessions(tmp_path / "provenance.json") == []


def test_until_when_a_run_was_seen(tmp_path: Path) -> None:
    assert sessions.last_seen(tmp_path) is None
    (tmp_path / "steps.jsonl").write_text('{"step": 1, "time": 5.0}\n{"step": 2, "time": 7.5}\n', encoding="utf-8")
    assert sessions.last_seen(tmp_path) == 7.5
    (tmp_path / "ended.json").write_text(json.dumps({"how": "failed", "time": 9}), encoding="utf-8")
    assert sessions.last_seen(tmp_path) == 9
    assert sessions.closed([{"time": 1}, {"time": 3}], 9) == [{"time": 1}, {"time": 3, "until": 9}]
    assert sessions.closed([], 9) == []
