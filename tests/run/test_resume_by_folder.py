"""`marl run RUN --resume`: the folder of a run instead of its config; and a refused resume leaves no trace of a lock."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marl_core import ConfigError, DataError, NumericError, PluginError, RunConfig, Runner, Strategy, dump_config
from marl_core.bank.views import View
from marl_core.cli.app import main
from marl_core.registry.strategy import hookimpl
from marl_core.store.lock import HOLDER_FILE

MakeConfig = Callable[..., RunConfig]
Told = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def done(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps; copy it."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    Runner(make_config(run={"folder": str(folder), "checkpoint_every": 1}, observers=["json-lines"])).train()
    return folder


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    """A run folder of one's own, which was moved."""
    return Path(shutil.copytree(done, tmp_path / "run", symlinks=True))


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "steps.jsonl").read_text(encoding="utf-8").splitlines()]


class TestByFolder:
    def test_it_goes_on_where_it_is_now_and_says_so(self, done: Path, run: Path, capsys: Told) -> None:
        before = (done / "steps.jsonl").read_bytes()
        assert main(["run", str(run), "--resume", "--set", "ppo.steps=3"]) == 0
        assert f"{run}: this run was started as {done}; it goes on where it is now." in capsys.readouterr().out
        assert steps(run) == [1, 2, 3]
        assert (done / "steps.jsonl").read_bytes() == before
        assert main(["run", str(run), "--resume"]) == 0  # from now on this is its folder
        said = capsys.readouterr().out
        assert "finished, 3 steps of 3" in said
        assert "was started as" not in said

    def test_without_resume_it_says_what_it_is(self, run: Path, capsys: Told) -> None:
        assert main(["run", str(run)]) == 2
        assert f"is the folder of a run. Go on with it: `marl run {run} --resume`" in capsys.readouterr().err
        assert steps(run) == [1, 2]

    def test_check_takes_it_too(self, run: Path, capsys: Told) -> None:
        assert main(["check", str(run)]) == 0
        assert "nothing speaks against this run" in capsys.readouterr().out

    def test_a_folder_without_a_run(self, run: Path, tmp_path: Path, capsys: Told) -> None:
        (tmp_path / "empty").mkdir()
        assert main(["run", str(tmp_path / "empty"), "--resume"]) == 2
        assert "holds no run. Give a config file or a run folder" in capsys.readouterr().err
        assert main(["run", str(tmp_path), "--resume"]) == 2
        assert f"Did you mean {run}?" in capsys.readouterr().err

    def test_its_folder_is_no_choice(self, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Told) -> None:
        assert main(["run", str(run), "--resume", "--set", "run.folder=other"]) == 2
        assert "--set run.folder=other: the run in" in capsys.readouterr().err
        monkeypatch.setenv("MARL__RUN__FOLDER", "other")
        assert main(["run", str(run), "--resume"]) == 2
        assert "MARL__RUN__FOLDER: the run in" in capsys.readouterr().err

    def test_a_name_that_yaml_would_read_as_a_number(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(run.parent)
        run.rename("010")
        assert main(["run", "010", "--resume", "--set", "ppo.steps=3", "-q"]) == 0
        assert steps(Path("010")) == [1, 2, 3]

    def test_a_secret_must_be_given_again(self, run: Path, capsys: Told) -> None:
        file = run / "config.yaml"
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace("subset: null", "subset: '[redacted]'"), encoding="utf-8")
        assert main(["run", str(run), "--resume"]) == 2
        assert "data.subset was struck out. Give it by --set data.subset=" in capsys.readouterr().err
        assert main(["run", str(run), "--resume", "--set", "data.subset=null", "--override"]) == 0

    def test_an_object_of_a_program_must_be_given_there(
        self, make_config: MakeConfig, tmp_path: Path, capsys: Told
    ) -> None:
        class Mine(Strategy):
            """The bare base."""

            @hookimpl
            def marl_reference(self) -> View:
                return View(None)

        config = make_config(run={"folder": str(tmp_path / "run")}, reference=Mine(), ppo={"steps": 1})
        Runner(config).train()
        assert main(["run", str(tmp_path / "run"), "--resume"]) == 2
        said = capsys.readouterr().err
        assert "started from Python with objects as strategies: reference.use (" in said
        assert "Runner(config, resume=True)" in said
        more = ["--set", "reference.use=disabled-adapter", "--set", "ppo.steps=2", "--override", "-q"]
        assert main(["run", str(tmp_path / "run"), "--resume", *more]) == 0

    def test_the_long_way_names_the_short_one(
        self, run: Path, make_config: MakeConfig, tmp_path: Path, capsys: Told
    ) -> None:
        file = tmp_path / "run.yaml"
        file.write_text(dump_config(make_config(run={"folder": str(run)})), encoding="utf-8")
        assert main(["run", str(file), "--resume", "--set", "ppo.minibatch=4", "--set", "ppo.steps=3"]) == 2
        assert f"`marl run {run} --resume` goes on with the run's own config" in capsys.readouterr().err


class TestNoTrace:
    """Whoever was refused has taken nothing: the next to resume hears of no dead process."""

    def refused(self, run: Path, config: RunConfig, error: type[BaseException], **given: Any) -> None:
        with pytest.raises(error) as kept:  # the error keeps the traceback, and that the Runner
            Runner(config, resume=True, **given).train()
        assert not (run / HOLDER_FILE).exists()
        assert kept.value is not None

    def config(self, make_config: MakeConfig, run: Path, **more: Any) -> RunConfig:
        return make_config(run={"folder": str(run), "checkpoint_every": 1}, **{"ppo": {"steps": 3}, **more})

    def test_another_config(self, make_config: MakeConfig, run: Path) -> None:
        self.refused(run, self.config(make_config, run, ppo={"minibatch": 4}), ConfigError)

    def test_another_input(self, make_config: MakeConfig, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("marl_core.store.folder.changes", lambda *_: (["data.prompts: p.jsonl"], []))
        self.refused(run, self.config(make_config, run), ConfigError)

    def test_a_damaged_checkpoint(self, make_config: MakeConfig, run: Path) -> None:
        for file in run.glob("checkpoints/*/manifest.json"):
            file.write_text("{", encoding="utf-8")
        self.refused(run, self.config(make_config, run), DataError)

    def test_a_checkpoint_that_does_not_fit(self, make_config: MakeConfig, run: Path) -> None:
        self.refused(run, self.config(make_config, run, policy={"r": 2}), DataError, override=True)

    def test_a_base_that_cannot_be_loaded(
        self, make_config: MakeConfig, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise DataError("model.path: it is gone")

        monkeypatch.setattr("marl_core.run.roles.AdapterBank.from_pretrained", broken)
        self.refused(run, self.config(make_config, run), DataError)

    @pytest.mark.parametrize(
        ("place", "error"),
        [
            ("marl_core.run.runner.build_roles", PluginError("a plugin")),
            ("marl_core.run.runner.build_roles", KeyboardInterrupt()),
            ("marl_core.run.runner.make_optimizer", KeyboardInterrupt()),
            ("marl_core.store.folder.recover", KeyboardInterrupt()),
            ("marl_core.run.runner.preflight", NumericError("a number")),
        ],
    )
    def test_whatever_comes_before_the_first_step(
        self, make_config: MakeConfig, run: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException
    ) -> None:
        def raises(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(place, raises)
        config = self.config(make_config, run)
        with pytest.raises(type(error)) as kept:
            Runner(config, resume=True).prepare()
        assert not (run / HOLDER_FILE).exists()
        assert kept.value is error

    def test_the_next_resume_hears_nothing_of_it(self, run: Path, tmp_path: Path, capfd: Told) -> None:
        """In processes of their own, as people type it."""
        command = [sys.executable, "-m", "marl_core.cli", "run", str(run), "--resume"]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        refused = subprocess.run(
            [*command, "--set", "policy.r=2", "--set", "ppo.steps=3", "--override"], env=environment, check=False
        )
        assert refused.returncode == 4
        assert subprocess.run([*command, "--set", "ppo.steps=3"], env=environment, check=False).returncode == 0
        said = capfd.readouterr()
        assert "took over" not in said.out + said.err

    def test_a_process_that_ends_of_itself_leaves_nothing(self, run: Path) -> None:
        """Even where something keeps the lock alive to the very end."""
        program = (
            "import sys, builtins\nfrom pathlib import Path\nfrom marl_core.store.lock import RunLock\n"
            "builtins.kept = RunLock(Path(sys.argv[1]))\nkept.take()\nbuiltins.kept.me = builtins.kept\n"
        )
        subprocess.run([sys.executable, "-c", program, str(run)], check=True)
        assert not (run / HOLDER_FILE).exists()
