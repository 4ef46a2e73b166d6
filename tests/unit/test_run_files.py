"""The run folder's parts: folders put in place, the lock, changed configs, full disks."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from marl_core import ConfigError, DataError, RunConfig, Runner, dump_config
from marl_core.errors import MarlWarning
from marl_core.store import atomic, checkpoint, files
from marl_core.store.config_diff import changed_keys
from marl_core.store.disk_space import SaveFailed, checkpoint_bytes, size_text

MakeConfig = Callable[..., RunConfig]
Usage = namedtuple("Usage", "total used free")


class PowerCut(BaseException):
    """The process ends here."""


def write(folder: Path, text: str) -> None:
    with files.new_folder(folder) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text(text, encoding="utf-8")


def cut_after(left: Iterator[int], real: Callable[..., Any]) -> Callable[..., Any]:
    """The function, until `left` is used up."""

    def call(*arguments: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise PowerCut
        return real(*arguments, **named)

    return call


@pytest.mark.parametrize("before", ["old", None], ids=["final", "a checkpoint"])
def test_whenever_the_power_goes_the_old_folder_or_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """Cut at every call that changes a name or flushes. Whole under its name, or put back there by `recover`; a new name may be missing."""
    seen: set[str | None] = set()
    for moment in range(40):
        folder = tmp_path / str(moment) / "it"
        folder.parent.mkdir()
        if before is not None:
            write(folder, before)
        left = iter(range(moment))
        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (Path, "rename"), (shutil, "rmtree")):
                patch.setattr(owner, name, cut_after(left, getattr(owner, name)))
            try:
                write(folder, "new")
                finished = True
            except PowerCut:
                finished = False
        atomic.recover(folder.parent)
        found = (folder / "inner" / "file").read_text(encoding="utf-8") if folder.exists() else None
        seen.add(found)
        assert [path.name for path in folder.parent.iterdir()] == ([] if found is None else ["it"])
        if finished:
            break
    assert finished
    assert seen == {before, "new"}


class TestChanges:
    def changes(self, make_config: MakeConfig, tmp_path: Path, override: bool = False, **now: Any) -> list[str]:
        file = tmp_path / "config.yaml"
        file.write_text(dump_config(make_config()), encoding="utf-8")
        return changed_keys(file, make_config(**now), override=override)

    def test_none(self, make_config: MakeConfig, tmp_path: Path) -> None:
        assert self.changes(make_config, tmp_path) == []

    def test_a_strategy_named_by_a_word_is_the_same_choice(self, make_config: MakeConfig, tmp_path: Path) -> None:
        """As runs wrote `ppo.advantage` before it was a strategy."""
        file, written = tmp_path / "config.yaml", dump_config(make_config())
        short = written.replace("  advantage:\n    use: gae\n", "  advantage: gae\n")
        assert short != written
        file.write_text(short, encoding="utf-8")
        assert changed_keys(file, make_config()) == []
        file.write_text(short.replace("advantage: gae", "advantage: rloo"), encoding="utf-8")
        with pytest.raises(ConfigError, match=r"ppo\.advantage\.use: 'rloo' -> 'gae'"):
            changed_keys(file, make_config())

    def test_harmless_ones_pass_and_are_said(self, make_config: MakeConfig, tmp_path: Path) -> None:
        found = self.changes(make_config, tmp_path, run={"keep": 3, "folder": "elsewhere"}, ppo={"steps": 9})
        assert found == ["config changed: ppo.steps: 2 -> 9", "config changed: run.keep: 2 -> 3"]

    def test_mathematical_ones_need_an_override(self, make_config: MakeConfig, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"(?s)mathematics.*\n  ppo.gamma: 1.0 -> 0.9\n.*override=True") as caught:
            self.changes(make_config, tmp_path, ppo={"gamma": 0.9}, run={"keep": 3})
        assert "run.keep" not in str(caught.value)
        found = self.changes(make_config, tmp_path, True, ppo={"gamma": 0.9}, run={"keep": 3})
        assert found == ["config changed (override=True): ppo.gamma: 1.0 -> 0.9", "config changed: run.keep: 2 -> 3"]

    def test_the_config_of_the_steps_so_far_is_kept(self, make_config: MakeConfig, tmp_path: Path) -> None:
        run = {"folder": str(tmp_path / "run")}
        Runner(make_config(run=run, ppo={"steps": 1})).train()
        Runner(make_config(run=run, ppo={"steps": 2, "gamma": 0.9}), resume=True, override=True).train()
        text = (tmp_path / "run" / "config-until-step-1.yaml").read_text(encoding="utf-8")
        assert "gamma: 1.0" in text


class TestFullDisk:
    def config(self, make_config: MakeConfig, tmp_path: Path, steps: int = 3) -> RunConfig:
        run = {"folder": str(tmp_path / "run"), "checkpoint_every": 1}
        return make_config(run=run, ppo={"steps": steps}, observers=["json-lines"])

    def fill(self, monkeypatch: pytest.MonkeyPatch, at: set[int], error: Exception) -> None:
        """Saves of these steps fail; the disk has 1,000 bytes left."""
        real: Any = vars(checkpoint)["save_file"]

        def save_file(tensors: Any, file: Path) -> None:
            if "optimizer" in file.name and any(checkpoint.name_of(step) in str(file) for step in at):
                file.write_bytes(b"half of it")
                raise error
            real(tensors, file)

        monkeypatch.setattr(checkpoint, "save_file", save_file)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))

    @pytest.mark.parametrize("kind", ["OSError", "SafetensorError"])
    def test_training_goes_on_and_the_older_checkpoint_is_whole(
        self, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        from safetensors import SafetensorError

        errors = {
            "OSError": OSError(28, "No space left on device"),
            "SafetensorError": SafetensorError("I/O error: No space left on device (os error 28)"),
        }
        runner = Runner(self.config(make_config, tmp_path))
        self.fill(monkeypatch, {2}, errors[kind])
        steps, missing = runner.steps(), size_text(checkpoint_bytes(runner.bank, runner.roles.trained) - 1000)
        next(steps)
        with pytest.warns(
            MarlWarning,
            match=rf"checkpoint of step 2 could not be written.*No space left on device.*1 kB are free; {missing} are missing\. "
            r"step-000001 is whole.*Training goes on",
        ):
            next(steps)
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
        assert checkpoint.damage(tmp_path / "run" / "checkpoints" / "step-000001") is None
        assert [stats.step for stats in steps] == [3]
        assert checkpoint.damage(tmp_path / "run" / "checkpoints" / "step-000003") is None

    def test_three_in_a_row_end_the_run(
        self, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runner = Runner(self.config(make_config, tmp_path, steps=6))
        self.fill(monkeypatch, {2, 3, 4}, OSError(28, "No space left on device"))
        with pytest.raises(SaveFailed, match="checkpoint of step 4") as caught:
            runner.train()
        assert caught.value.exit_code == 4
        assert runner.done == 4

    def test_by_hand_it_is_an_error(
        self, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runner = Runner(self.config(make_config, tmp_path))
        self.fill(monkeypatch, {0}, OSError(28, "No space left on device"))
        with pytest.raises(DataError, match="There is no checkpoint yet"):
            runner.save()

    def test_what_is_needed_is_what_is_written(self, make_config: MakeConfig, tmp_path: Path) -> None:
        runner = Runner(self.config(make_config, tmp_path, steps=1))
        runner.train()
        written = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoints").rglob("*") if file.is_file())
        assert written <= checkpoint_bytes(runner.bank, runner.roles.trained) < written + 300_000

    def test_a_real_limit_of_the_system(self, make_config: MakeConfig, tmp_path: Path) -> None:
        """No injection: the system refuses to write files above some size, as it would on a full disk."""
        runner = Runner(self.config(make_config, tmp_path))
        steps = runner.steps()
        next(steps)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.warns(MarlWarning, match="File too large.*step-000001 is whole"):
                next(steps)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert checkpoint.damage(tmp_path / "run" / "checkpoints" / "step-000001") is None
        assert [stats.step for stats in steps] == [3]

    def test_json_lines_wait_for_room(self, make_config: MakeConfig, tmp_path: Path) -> None:
        """The observer's lines wait in memory while the system refuses them; none is lost, none is written in half."""
        observers = [{"use": "json-lines", "samples": 0}]
        config = make_config(run={"folder": str(tmp_path / "run")}, ppo={"steps": 4}, observers=observers)
        steps, file = Runner(config).steps(), tmp_path / "run" / "steps.jsonl"
        next(steps)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 100, hard))
        try:
            with pytest.warns(MarlWarning, match=r"steps.jsonl \(File too large\).*1 line\(s\) wait"):
                next(steps)
            next(steps)  # said once: a second warning would be an error here
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [json.loads(line)["step"] for line in file.read_text(encoding="utf-8").splitlines()] == [1]
        next(steps)
        assert [json.loads(line)["step"] for line in file.read_text(encoding="utf-8").splitlines()] == [1, 2, 3, 4]

    def test_little_room_is_said_at_the_start(
        self, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
        with pytest.warns(MarlWarning, match="may run out of room for checkpoints"):
            next(Runner(self.config(make_config, tmp_path)).steps())
