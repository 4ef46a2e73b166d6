"""The hub can't be reached: one question, one sentence with the way out; what the cache holds works; a hub that answers is left alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from marl_core import AdapterBank, DataError, hub_read
from marl_core.artifacts import hub
from marl_core.artifacts.rows import read_rows
from marl_core.artifacts.tokenizer import load_tokenizer
from marl_core.testing import tiny_bank, write_tiny_model
from marl_plugins.reward import ModelReward
from marl_plugins.reward_model import RewardModel

NAME = "owner/nowhere"


class Asked:
    """Stands for huggingface_hub's session: counts the questions, and nobody answers."""

    def __init__(self, error: Exception | None = None) -> None:
        self.questions: list[str] = []
        self.error = error

    def head(self, url: str, timeout: float) -> None:
        """No answer."""
        assert timeout <= 10
        self.questions.append(url)
        if self.error is not None:
            raise self.error


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asked:
    """No hub, and an empty cache. A request past the question is a fault of the test's."""
    monkeypatch.chdir(tmp_path)
    asked = Asked(OSError("Name or service not known"))
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: asked)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "_probed", {})
    return asked


def reward_model() -> RewardModel:
    return RewardModel(ModelReward(path=NAME), "cpu")


READS: dict[str, tuple[Callable[[], Any], str]] = {
    "a model": (lambda: AdapterBank.from_pretrained(NAME), "model.path"),
    "a tokenizer": (lambda: load_tokenizer(NAME, asked_by="model.tokenizer"), "model.tokenizer"),
    "an adapter": (lambda: tiny_bank().load("sft", NAME, asked_by="policy.from"), "policy.from"),
    "a reward model": (reward_model, "reward.path"),
    "a data set": (lambda: read_rows(NAME, "train", None, None), "data.prompts"),
}


@pytest.mark.parametrize("read", READS)
def test_one_question_and_one_sentence(read: str, away: Asked) -> None:
    call, asked_by = READS[read]
    started = time.monotonic()
    with pytest.raises(DataError) as refused:
        call()
    assert time.monotonic() - started < 10
    assert away.questions == ["https://hub.example"]
    assert str(refused.value) == (
        f"{asked_by}: {NAME!r} is no local folder and could not be downloaded from the hub: https://hub.example can't be reached "
        "(Name or service not known), and this machine's cache lacks it. Give a folder, or set HF_ENDPOINT to a mirror that can be "
        "reached."
    )
    assert not constants.HF_HUB_OFFLINE, "the setting is put back"


def test_it_is_asked_again_after_a_while(away: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.hub_away() == hub.hub_away() != None  # noqa: E711  # the same sentence, twice
    assert len(away.questions) == 1
    monkeypatch.setattr(hub, "PROBED_AGAIN_SECONDS", 0.0)
    away.error = None
    assert hub.hub_away() is None
    away.error = OSError("gone")
    assert hub.hub_away() is None, "a hub that has answered isn't asked again"
    assert len(away.questions) == 2


def test_offline_by_choice_is_said_so(away: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="from the hub: HF_HUB_OFFLINE is set, and this machine's cache lacks it"):
        load_tokenizer(NAME)
    assert away.questions == []


@pytest.mark.parametrize("name", ["/no/such/folder", "./here", ".."])
def test_what_is_no_name_asks_nobody(name: str, away: Asked) -> None:
    with pytest.raises(ZeroDivisionError), hub_read(name, "model.path"):
        raise ZeroDivisionError
    assert away.questions == []


def test_other_errors_stay_what_they_are(away: Asked) -> None:
    with pytest.raises(ZeroDivisionError), hub_read(NAME, "model.path"):
        raise ZeroDivisionError


def test_a_cached_model_needs_no_hub(away: Asked, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "base")
    commit = "1" * 40
    repository = tmp_path / "hub" / "models--owner--here"
    shutil.copytree(tmp_path / "base", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert AdapterBank.from_pretrained("owner/here", dtype="float32").source == "owner/here"
    assert away.questions == ["https://hub.example"]


@pytest.fixture
def answering() -> Iterator[str]:
    """A hub that answers, and knows nobody."""

    class Knows(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *arguments: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Knows)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def marl(folder: Path, endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf")}
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "mine.py").write_text("def score(completions, **columns):\n    return [0.0 for _ in completions]\n")
    (folder / "run.yaml").write_text(
        json.dumps(
            {
                "model": {"path": NAME},
                "reference": "disabled-adapter",
                "reward": {"use": "function", "target": "mine.py:score"},
                "data": {"prompts": "prompts.jsonl"},
                "run": {"device": "cpu"},
            }
        )
    )
    return subprocess.run(
        [sys.executable, "-m", "marl_core.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
    )


def test_the_command_line_says_it_before_it_loads_anything(tmp_path: Path) -> None:
    """Nobody listens on port 9."""
    done = marl(tmp_path, "http://127.0.0.1:9", "run", "run.yaml")
    assert done.returncode == 4
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"marl: model.path: {NAME!r} is no local folder and could not be downloaded from the hub: http://127"
    )
    assert "loading" not in done.stdout


def test_where_the_example_model_is_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "model.py").write_text("")
    said = marl(tmp_path, "http://127.0.0.1:9", "run", "run.yaml").stderr
    assert "add `--set model.path=$(python examples/model.py)`" in said


def test_a_model_given_by_set_and_forgotten_at_the_resume_is_told_before_the_hub_is_asked(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"model": {"path": "/models/small"}}), encoding="utf-8")
    done = marl(tmp_path, "http://127.0.0.1:9", "run", "run.yaml", "--set", "run.folder=runs/one", "--resume")
    assert done.returncode == 2
    assert f"model.path: '/models/small' -> {NAME!r}" in done.stderr
    assert "`marl run runs/one --resume` goes on with the run's own config." in done.stderr


def test_a_hub_that_doesn_t_know_the_name_keeps_its_own_words(tmp_path: Path, answering: str) -> None:
    done = marl(tmp_path, answering, "run", "run.yaml")
    assert done.returncode == 4
    assert "is not a valid model identifier" in done.stderr or "Repository Not Found" in done.stderr
    assert "can't be reached" not in done.stderr
