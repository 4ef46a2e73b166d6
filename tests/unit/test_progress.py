"""What a run tells while it goes: the phases of a step to observers, milestones to `logging`, all of it before it is over."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import PrivateAttr

from marl_core import Runner, Strategy, hookimpl
from marl_core.ppo.progress import advance, listening, part, phase
from marl_core.testing import write_tiny_model
from marl_plugins.screen import phase_text


class Hears(Strategy):
    """Notes every phase with its counts."""

    _heard: list[tuple[str, int, int]] = PrivateAttr(default_factory=list)

    @hookimpl
    def marl_progress(self, phase: str, done: int, total: int) -> None:
        """One entry."""
        self._heard.append((phase, done, total))

    def fresh(self) -> Hears:
        """Itself, so that the test reads what the run told."""
        return self


def test_each_phase_of_a_step_begins_and_ends(make_config: Callable[..., Any], prompts_file: str) -> None:
    ear = Hears()
    config = make_config(
        observers=[ear],
        value="own",
        eval={"prompts": prompts_file, "limit": 4, "seeds": 2},
        ppo={"steps": 1, "batch": 4, "minibatch": 2, "epochs": 3},
        speed={"capture": False},
    )
    Runner(config).train()
    heard = ear._heard
    step = [entry for entry in heard if not entry[0].startswith("evaluation")]
    firsts = list(dict.fromkeys(name for name, _, _ in step))
    names = ["sampling", *(f"scoring: {who}" for who in ("policy", "value", "reference", "reward function")), "update"]
    assert firsts == names
    totals = {name: {total for told, _, total in step if told == name} for name in names}
    assert totals == {name: {6 if name in ("sampling", "update") else 4} for name in names}  # tokens; 3 epochs of 2
    for name in names:
        assert (name, 0, *totals[name]) in step
        if name != "scoring: reward function":  # a function is called once, and is over when it returns
            assert step[[told for told, _, _ in step].index(name) :][0][1] == 0
            assert (name, *totals[name], *totals[name]) in step
    assert ("evaluation", 0, 8) in heard
    assert ("evaluation", 4, 8) in heard
    assert ("evaluation", 8, 8) in heard
    assert any(name == "evaluation: sampling" for name, _, _ in heard)
    assert not any(name.startswith("pre-flight") for name, _, _ in heard), "before marl_run_start nothing is told"


def test_transformers_way_to_sample_tells_tokens_too(make_config: Callable[..., Any]) -> None:
    ear = Hears()
    sampling = {"max_new_tokens": 6, "min_new_tokens": 6, "rows": 2}
    Runner(
        make_config(observers=[ear], sampling=sampling, speed={"decode": "transformers"}, ppo={"steps": 1, "batch": 4})
    ).train()
    told = [(done, total) for name, done, total in ear._heard if name == "sampling"]
    assert (0, 12) in told  # two pieces of six tokens
    assert told[-1] == (12, 12)
    assert told == sorted(told)


def test_parts_and_nested_phases_count_as_one() -> None:
    heard: list[tuple[str, int, int]] = []
    advance(1, 2)
    with listening(lambda *told: heard.append(told)):
        advance(1, 2)  # in no phase
        with phase("evaluation"), part(1, 2):
            advance(1, 4)
            with phase("sampling"):
                advance(1, 4)
            advance(2, 4)
    advance(1, 2)
    assert heard == [("evaluation", 5, 8), ("evaluation: sampling", 1, 4), ("evaluation", 6, 8)]


def test_a_phase_that_runs_fast_is_told_a_few_times(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("marl_core.run.observers.TOLD_EVERY_SECONDS", 1000.0)
    ear = Hears()
    Runner(make_config(observers=[ear], ppo={"steps": 1, "batch": 4, "minibatch": 1, "epochs": 4})).train()
    assert [done for name, done, _ in ear._heard if name == "update"] == [0, 16]


@pytest.mark.parametrize(
    ("told", "text"),
    [
        (("update", 0, 6), "update: epoch 1/3, minibatch 1/2"),
        (("update", 3, 6), "update: epoch 2/3, minibatch 2/2"),
        (("update", 6, 6), "update: epoch 3/3, minibatch 2/2"),
        (("evaluation: sampling", 5, 64), "evaluation: sampling 5/64"),
        (("scoring: reward function", 0, 64), "scoring: reward function"),  # called once: it never gets to 1
        (("sampling", 1, 1), "sampling"),
    ],
)
def test_the_bar_s_words(told: tuple[str, int, int], text: str) -> None:
    assert phase_text(*told, epochs=3) == text


def test_milestones_are_logged(
    make_config: Callable[..., Any], prompts_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(
        run={"folder": str(tmp_path / "run"), "checkpoint_every": 1}, eval={"prompts": prompts_file, "limit": 2}
    )
    with caplog.at_level(logging.DEBUG, "marl"):
        Runner(config).train()
        longer = make_config(run={"folder": str(tmp_path / "run")}, ppo={"steps": 3}, eval={"prompts": prompts_file})
        Runner(longer, resume=True, override=True).train()
    said = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    for name, level, beginning in (
        ("marl.loading", "INFO", "model "),
        ("marl.loading", "INFO", "roles: policy, value on policy, reference disabled-adapter, reward function"),
        ("marl.loading", "INFO", "6 prompts, 6 held out"),
        ("marl.preflight", "INFO", "ratio on the first minibatch"),
        ("marl.run", "INFO", "evaluation at step 0: reward"),
        ("marl.run", "INFO", f"checkpoint saved in {tmp_path}"),
        ("marl.run", "DEBUG", "step 1 of 2: generate "),
        ("marl.run", "INFO", "finished after 2 steps, in "),
        ("marl.run", "INFO", "resumed at step 2 from "),
    ):
        assert any(told[:2] == (name, level) and told[2].startswith(beginning) for told in said), (beginning, said)


def test_a_program_that_configures_no_logging_sees_nothing(
    make_config: Callable[..., Any], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    Runner(make_config()).train()
    assert "marl" not in "".join(capfd.readouterr())


def test_other_ranks_log_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from marl_core.logs import RUN, logger

    monkeypatch.setenv("RANK", "1")
    with caplog.at_level(logging.INFO, "marl"):
        logger(RUN).info("twice")
    assert not caplog.records


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "base")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"text {i}"}) + "\n" for i in range(4)))
    (tmp_path / "mine.py").write_text(
        "def score(completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    )
    file = tmp_path / "run.yaml"
    file.write_text(
        json.dumps(
            {
                "model": {"path": str(tmp_path / "base"), "dtype": "float32"},
                "reference": "disabled-adapter",
                "reward": {"use": "function", "target": f"{tmp_path}/mine.py:score"},
                "data": {"prompts": f"{tmp_path}/prompts.jsonl"},
                "eval": {"prompts": f"{tmp_path}/prompts.jsonl"},
                "sampling": {"max_new_tokens": 4},
                "ppo": {"steps": 2, "batch": 2, "minibatch": 1, "epochs": 2},
                "run": {"device": "cpu", "folder": str(tmp_path / "run")},
            }
        )
    )
    return file


def marl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "marl_core.cli", *arguments], capture_output=True, text=True, check=True
    )


def test_plan_then_loading_then_pre_flight_then_steps(config: Path) -> None:
    done = marl("run", str(config))
    order = (
        "role ",
        "loading     torch",
        "loading     model ",
        "loading     roles",
        "pre-flight  ok",
        "held out at",
        "  step ",
    )
    places = [next(i for i, line in enumerate(done.stdout.splitlines()) if line.startswith(word)) for word in order]
    assert places == sorted(places)
    assert "marl.run" not in done.stderr
    assert "Loading weights" not in done.stderr


def test_the_plan_is_there_before_anything_is_read(config: Path) -> None:
    """A finder sees the runner's module imported, which all that reads weights comes after."""
    (config.parent / "sees.py").write_text(
        "import sys\n"
        "class Sees:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'marl_core.run.runner':\n"
        "            print('READING', flush=True)\n"
        "sys.meta_path.insert(0, Sees())\n"
    )
    path = os.pathsep.join([str(config.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = "import sees; from marl_core.cli.app import main; raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(config)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    before, found, after = done.stdout.partition("READING")
    assert found
    assert "observers" in before
    assert "loading     model" in after


def test_verbose_tells_milestones_and_twice_phases(config: Path) -> None:
    once = marl("run", str(config), "-v", "--quiet")
    assert once.stdout == ""
    assert re.search(r"^marl\.run: finished after 2 steps", once.stderr, re.MULTILINE)
    assert "marl.run: step 1 of 2" not in once.stderr
    twice = marl("run", str(config), "--set", f"run.folder={config.parent / 'other'}", "-vv")
    assert re.search(r"^marl\.run: step 1 of 2: generate \d", twice.stderr, re.MULTILINE)
    assert "marl.loading" not in twice.stderr, "what standard output tells isn't told twice"


def test_libraries_are_silent_and_verbose_keeps_them(config: Path) -> None:
    """Weights and a data set's folder are read, each with a bar of its library's."""
    folder = config.parent / "data"
    folder.mkdir()
    (config.parent / "prompts.jsonl").rename(folder / "train.jsonl")
    sets = ["--set", f"data.prompts={folder}", "--set", "eval={}", "--set", "reward.0.target=mine.py:score"]
    environment = {**os.environ, "HF_HOME": str(config.parent / "hf")}
    for verbose in ([], ["-v"]):
        command = [
            sys.executable,
            "-m",
            "marl_core.cli",
            "run",
            str(config),
            *sets,
            "--set",
            f"run.folder=run{len(verbose)}",
        ]
        done = subprocess.run(
            [*command, *verbose], capture_output=True, text=True, check=True, env=environment, cwd=config.parent
        )
        assert ("Loading weights" in done.stderr) is bool(verbose)
        assert verbose or done.stderr == ""
        assert f"loading     data set {folder}, split train" in done.stdout


@pytest.mark.parametrize("command", [["check", "RUN"], ["plugins"], ["schema"]])
def test_verbose_goes_with_every_command(config: Path, command: list[str]) -> None:
    given = [str(config) if word == "RUN" else word for word in command]
    assert marl(*given, "--verbose").stdout == marl(*given).stdout


def test_on_a_terminal_the_bar_names_the_phase(config: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "200", "TERM": "xterm"}
    slow = config.parent / "mine.py"
    slow.write_text(
        "import time\ndef score(completions, **columns):\n    time.sleep(0.5)\n    return [1.0 * len(text) for text in completions]\n"
    )
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
    text = output.decode()
    assert "scoring: reward function" in text
    assert "evaluation: reward function" in text
    assert text.count("\x1b[?25h") == text.count("\x1b[?25l"), "the cursor is shown again"
