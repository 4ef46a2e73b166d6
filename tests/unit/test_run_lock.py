"""The lock of a run folder: the system's own, for the life of the run, on any host, and gone with its process."""

from __future__ import annotations

import errno
import gc
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from marl_core import ConfigError, RunConfig, Runner
from marl_core.store import lock
from marl_core.store.lock import RunLock

MakeConfig = Callable[..., RunConfig]
HOLD = """
import sys
from pathlib import Path
from marl_core.store.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print(lock.take(), flush=True)
sys.stdin.read()
"""
TRY = """
import sys
from pathlib import Path
from marl_core.errors import ConfigError
from marl_core.store.lock import RunLock
try:
    print("took", RunLock(Path(sys.argv[1])).take())
except ConfigError as error:
    print("refused", error)
"""


def other(folder: Path) -> str:
    """What another process gets that wants the folder."""
    done = subprocess.run([sys.executable, "-c", TRY, str(folder)], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has taken the folder and lives."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "None\n"
        yield process
        process.kill()


def test_another_process_is_refused_while_it_lives_and_told_who(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=rf"in use by another run, process {holder.pid} on .*Wait for it, stop it"):
        RunLock(tmp_path).take()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_kill_frees_it(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    mine = RunLock(tmp_path)
    note = mine.take()
    assert note is not None
    assert note.startswith(f"took over the lock of process {holder.pid} on ")
    assert note.endswith(", which is dead")
    assert other(tmp_path).startswith(f"refused run.folder: {tmp_path} is in use by another run, process {os.getpid()}")


@pytest.mark.parametrize(
    "left",
    [
        {"pid": 1, "host": "elsewhere"},  # a job that was killed there and is started here
        {"pid": os.getpid(), "host": "elsewhere"},  # a container has the same few numbers again
        {"pid": os.getppid(), "host": "here"},
        {},
        [],
        "{",
    ],
)
def test_no_words_of_a_dead_run_block_it(tmp_path: Path, left: Any) -> None:
    """Neither the host nor the number decides, only the system's lock; older versions wrote both into `.lock` itself."""
    for name in (lock.LOCK_FILE, lock.HOLDER_FILE):
        (tmp_path / name).write_text(left if isinstance(left, str) else json.dumps(left), encoding="utf-8")
    RunLock(tmp_path).take()
    gc.collect()
    assert other(tmp_path) == "took None\n"


def test_released_it_is_free_and_may_be_taken_again(tmp_path: Path) -> None:
    mine = RunLock(tmp_path)
    assert mine.take() is None
    assert mine.take() is None
    assert other(tmp_path).startswith("refused")
    mine.release()
    mine.release()
    assert other(tmp_path) == "took None\n"
    assert mine.take() is None
    assert other(tmp_path).startswith("refused")


def test_nobody_holds_what_was_collected(tmp_path: Path) -> None:
    mine = RunLock(tmp_path)
    mine.take()
    del mine
    gc.collect()
    assert other(tmp_path) == "took None\n"


def test_in_one_process_the_newest_wins(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path / "." / "..")
    second.folder = tmp_path / ".." / tmp_path.name  # the same folder by another name
    first.take()
    assert second.take() is None
    first.release()  # has nothing to give back
    assert other(tmp_path).startswith("refused")
    with pytest.raises(ConfigError, match="taken over by a Runner that this process made later"):
        first.take()
    second.release()
    with pytest.raises(ConfigError, match="taken over"):
        first.take()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_neither_holds_nor_frees_it(tmp_path: Path) -> None:
    mine = RunLock(tmp_path)
    mine.take()
    child = os.fork()
    if child == 0:
        try:
            RunLock(tmp_path).take()
            os._exit(1)
        except ConfigError:
            mine.release()
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert other(tmp_path).startswith(f"refused run.folder: {tmp_path} is in use by another run, process {os.getpid()}")


@pytest.mark.skipif(sys.platform == "win32", reason="flock is POSIX's")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_no_marker_is_left_where_flock_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A marker file instead of a lock would outlive a kill and block the next run."""
    import fcntl

    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        mine = RunLock(tmp_path)
        assert "has no locks" in (mine.take() or "")
        del mine
        gc.collect()


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_disk_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def acquire(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    note = RunLock(tmp_path).take()
    assert note is not None
    assert "has no locks" in note
    assert "nothing keeps a second run out" in note


class TestRunner:
    def config(self, make_config: MakeConfig, tmp_path: Path, **more: Any) -> RunConfig:
        return make_config(run={"folder": str(tmp_path / "run"), "checkpoint_every": 1}, **more)

    def test_holds_it_from_its_start_to_the_end_of_train(self, make_config: MakeConfig, tmp_path: Path) -> None:
        runner = Runner(self.config(make_config, tmp_path))
        assert not (tmp_path / "run").exists()
        steps = runner.steps()
        next(steps)
        assert other(tmp_path / "run").startswith("refused")
        del steps
        assert other(tmp_path / "run").startswith("refused")  # it may go on by step(), or save
        runner.train()
        assert other(tmp_path / "run") == "took None\n"
        runner.save()  # taken again: nobody has it
        assert other(tmp_path / "run").startswith("refused")
        del runner
        gc.collect()
        assert other(tmp_path / "run") == "took None\n"

    def test_built_anew_the_first_one_writes_no_more(self, make_config: MakeConfig, tmp_path: Path) -> None:
        """A notebook's cell run twice: two live Runners, and one folder."""
        config = self.config(make_config, tmp_path)
        first = Runner(config)
        steps = first.steps()
        next(steps)
        second = Runner(config, resume=True)
        assert second.done == 1
        with pytest.raises(ConfigError, match="taken over by a Runner that this process made later"):
            next(steps)
        for write in (first.save, first.train):
            with pytest.raises(ConfigError, match="taken over by a Runner that this process made later"):
                write()
        assert second.train().steps == 2

    def test_a_new_run_does_not_take_it_from_one_that_has_begun(self, make_config: MakeConfig, tmp_path: Path) -> None:
        config = self.config(make_config, tmp_path)
        first, second = Runner(config), Runner(config)
        steps = first.steps()
        next(steps)
        with pytest.raises(ConfigError, match="was taken by another run meanwhile"):
            next(second.steps())
        next(steps)

    def test_a_resume_that_is_refused_gives_it_back(self, make_config: MakeConfig, tmp_path: Path) -> None:
        Runner(self.config(make_config, tmp_path)).train()
        with pytest.raises(ConfigError, match="mathematics") as kept:
            Runner(self.config(make_config, tmp_path, ppo={"gamma": 0.5}), resume=True)
        assert other(tmp_path / "run") == "took None\n"
        assert kept  # the error, and with it every frame, is alive


WITHOUT = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
import accelerate, datasets, filelock, peft, pluggy, pydantic, requests, rich.progress, safetensors.torch, torch, transformers, typer, yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for owner, name in ((signal, "SIGKILL"), (signal, "SIGHUP"), (signal, "SIGALRM"), (signal, "pthread_kill"), (os, "fork")):
    delattr(owner, name)
for name in ("fchmod", "getuid", "getpgid", "killpg", "register_at_fork", "O_DIRECTORY", "O_NOFOLLOW", "statvfs"):
    delattr(os, name)
import marl_core.cli.app, marl_core.run, marl_core.run.runner, marl_core.run.replay, marl_core.report.publish, marl_core.report.page
import marl_plugins.observers, marl_plugins.screen, marl_plugins.lines, marl_plugins.samples, marl_plugins.trackers
import marl_plugins.reward, marl_plugins.reward_function, marl_plugins.reward_http, marl_plugins.time_limit
print("imported")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="what is hidden here isn't there")
def test_importing_needs_nothing_of_posix() -> None:
    """What Python has on POSIX alone is hidden once the libraries, which ask for the system's name, are imported."""
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.stdout.strip().endswith("imported"), done.stderr


def test_who_else_holds_a_folder_is_told_without_taking_it(tmp_path: Path) -> None:
    assert not lock.is_held(tmp_path)
    holder = tmp_path / lock.HOLDER_FILE
    for value, held in (
        ({"pid": os.getpid(), "host": platform.node()}, True),
        ({"pid": 2**22 + 1, "host": platform.node()}, False),
        ({"pid": 2**40, "host": platform.node()}, True),
        ({"pid": 0, "host": platform.node()}, False),
        ({"pid": 2**22 + 1, "host": "another"}, True),
    ):
        holder.write_text(json.dumps(value), encoding="utf-8")
        assert lock.is_held(tmp_path) is held, value
