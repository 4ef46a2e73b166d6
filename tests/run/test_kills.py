"""A run that is killed, at any moment, goes on as if nothing had happened; one that is asked to stop saves first."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from marl_core import ConfigError, RunConfig, Runner, dump_config
from marl_core.store import checkpoint
from marl_core.store.files import read_lines

MakeConfig = Callable[..., RunConfig]
STEPS, EVERY = 6, 2
PPO = {
    "steps": STEPS, "batch": 4, "minibatch": 2, "epochs": 2, "schedule": "cosine",
    "kl": {"coef": 0.2, "target": 0.5, "horizon": 40},
}  # fmt: skip
REWARD = """
import os, time

def odd(completion_ids, **columns):
    while os.path.exists({flag!r}):
        time.sleep(0.01)
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]
"""


class Forks:
    """The process that forks runs."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forks.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        assert self._line() == "ready"

    def start(self, run: Run, *options: str, flush: int | None = None) -> int:
        """Begin a run; its process id."""
        order = {
            "config": str(run.config),
            "options": options,
            "flush": flush,
            "log": str(run.log),
            "count": str(run.count),
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """Exit code of the run, negative for a signal's number."""
        return int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        assert self.process.stdout is not None
        self.process.stdout.close()


@dataclass(frozen=True)
class Run:
    """One run's files."""

    home: Path

    @property
    def config(self) -> Path:
        return self.home / "run.yaml"

    @property
    def folder(self) -> Path:
        return self.home / "run"

    @property
    def log(self) -> Path:
        return self.home / "log"

    @property
    def count(self) -> Path:
        return self.home / "count"

    @property
    def flag(self) -> Path:
        return self.home / "wait"

    def resume(self) -> list[str]:
        return ["--resume"] if (self.folder / "config.yaml").exists() else []

    def last_step(self) -> int:
        return max((line["step"] for line in read_lines(self.folder / "steps.jsonl")), default=0)

    def saved_step(self) -> int:
        found = sorted((self.folder / "checkpoints").glob("step-*"), reverse=True)
        return next((checkpoint.step_of(path) for path in found if checkpoint.damage(path) is None), 0)

    def result(self) -> dict[str, Any]:
        """Everything a finished run leaves that must be the same, byte for byte or number for number."""
        files = [
            *(self.folder / "final").rglob("*"),
            *(self.folder / "checkpoints" / checkpoint.name_of(STEPS)).rglob("*"),
        ]
        found: dict[str, Any] = {str(f.relative_to(self.folder)): f.read_bytes() for f in files if f.is_file()}
        for name in ("steps.jsonl", "samples.jsonl", "evals.jsonl"):
            lines = [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]
            found[name] = [
                {k: v for k, v in line.items() if k != "time" and not k.startswith("perf/")} for line in lines
            ]
        return found


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def new_run(make_config: MakeConfig, prompts_file: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Run]:
    def make() -> Run:
        run = Run(tmp_path_factory.mktemp("killed"))
        (run.home / "rewards.py").write_text(REWARD.format(flag=str(run.flag)), encoding="utf-8")
        config = make_config(
            ppo=PPO,
            value={"on": "own", "r": 2},
            policy={"r": 4, "alpha": 8, "dropout": 0.1},
            shaping={"normalize": True},
            reward={"use": "function", "target": f"{run.home}/rewards.py:odd"},
            observers=["json-lines"],
            eval={"prompts": prompts_file, "every": 3, "limit": 2},
            run={"folder": str(run.folder), "checkpoint_every": EVERY, "keep": 2, "threads": 1},
        )
        run.config.write_text(dump_config(config), encoding="utf-8")
        return run

    return make


@pytest.fixture(scope="module")
def whole(forks: Forks, new_run: Callable[[], Run]) -> tuple[dict[str, Any], float, int]:
    """The run that nobody stopped: its result, its seconds, and how often it flushed a file to the disk."""
    run = new_run()
    begin = time.monotonic()
    forks.start(run)
    assert forks.wait() == 0, run.log.read_text(encoding="utf-8")
    return run.result(), time.monotonic() - begin, int(run.count.read_text(encoding="utf-8"))


def kill_often(
    kills: int, seed: int, forks: Forks, new_run: Callable[[], Run], whole: tuple[dict[str, Any], float, int]
) -> None:
    """Start or resume, kill, look at what is left; when a run gets through, compare it and begin another."""
    expected, seconds, flushes = whole
    moments = random.Random(seed)
    run, killed = new_run(), 0
    while killed < kills:
        inside = killed % 2 == 0
        number = forks.start(run, *run.resume(), flush=moments.randint(1, flushes) if inside else None)
        if not inside:
            time.sleep(moments.uniform(0, seconds))
            with suppress(ProcessLookupError):  # it got through meanwhile
                os.kill(number, signal.SIGKILL)
        code = forks.wait()
        assert code in (0, -signal.SIGKILL), run.log.read_text(encoding="utf-8")
        if code == 0:
            assert run.result() == expected
            run = new_run()
        else:
            killed += 1
            assert run.last_step() - run.saved_step() <= EVERY, "more than one save interval is lost"
    forks.start(run, *run.resume())
    assert forks.wait() == 0, run.log.read_text(encoding="utf-8")
    assert run.result() == expected
    assert [path.name for path in run.folder.rglob(".*")] == [".lock"], "something was left behind"


def test_five_kills_change_nothing(
    forks: Forks, new_run: Callable[[], Run], whole: tuple[dict[str, Any], float, int]
) -> None:
    kill_often(5, 0, forks, new_run, whole)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1, 6))
def test_fifty_kills_change_nothing(
    seed: int, forks: Forks, new_run: Callable[[], Run], whole: tuple[dict[str, Any], float, int]
) -> None:
    kill_often(10, seed, forks, new_run, whole)


def until(condition: Callable[[], bool], run: Run) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(run.log.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves_the_step_and_goes_on_from_there(
    number: signal.Signals,
    code: int,
    forks: Forks,
    new_run: Callable[[], Run],
    whole: tuple[dict[str, Any], float, int],
) -> None:
    run = new_run()
    child = forks.start(run)
    until(lambda: run.last_step() >= 1, run)
    run.flag.touch()  # the reward of the next step waits, so that the signal comes inside a step
    time.sleep(0.05)
    os.kill(child, number)
    until(lambda: f"{number.name}: stopping after this step" in run.log.read_text(encoding="utf-8"), run)
    run.flag.unlink()
    assert forks.wait() == code
    words = run.log.read_text(encoding="utf-8")
    assert f"stopped by {number.name} after step {run.last_step()}; saved in" in words
    assert "--resume`" in words
    assert "Traceback" not in words
    assert run.saved_step() == run.last_step() < STEPS
    forks.start(run, "--resume")
    assert forks.wait() == 0
    assert run.result() == whole[0]


def test_asked_twice_it_stops_at_once(forks: Forks, new_run: Callable[[], Run]) -> None:
    run = new_run()
    child = forks.start(run)
    until(lambda: run.saved_step() >= EVERY, run)  # the step's line is written before its checkpoint
    run.flag.touch()
    time.sleep(0.1)
    os.kill(child, signal.SIGTERM)
    until(lambda: "once more stops at once" in run.log.read_text(encoding="utf-8"), run)
    os.kill(child, signal.SIGTERM)
    assert forks.wait() == -signal.SIGTERM  # a shell shows 143
    assert run.saved_step() >= EVERY


def test_a_folder_belongs_to_one_process_until_it_is_dead(forks: Forks, new_run: Callable[[], Run]) -> None:
    from marl_core import load_config

    run = new_run()
    child = forks.start(run)
    try:
        until(lambda: run.last_step() >= 1, run)
        run.flag.touch()
        time.sleep(0.2)
        config = load_config(run.config)
        before = {path: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}
        with pytest.raises(ConfigError, match=rf"is in use by another run, process {child} on .*Wait for it, stop it"):
            Runner(config, resume=True)
        assert {path: path.read_bytes() for path in run.folder.iterdir() if path.is_file()} == before
    finally:
        os.kill(child, signal.SIGKILL)
        assert forks.wait() == -signal.SIGKILL
    run.flag.unlink()
    runner = Runner(config, resume=True)
    assert runner.folder is not None
    assert runner.folder.notes[0].startswith(f"took over the lock of process {child} on ")
    runner.folder.release()
