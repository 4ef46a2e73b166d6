"""What is left of a run that fails, and of a loop by hand that nobody ended: nothing is lost, and what is lost is said."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from marl_core import ConfigError, MarlWarning, PluginError, RunConfig, Runner
from marl_core.config.ppo_config import PPOSection
from marl_core.run.optimizer import learning_rate_factor

MakeConfig = Callable[..., RunConfig]


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


class FailsAt:
    """A reward that raises in one call."""

    def __init__(self, call: int) -> None:
        self.call, self.calls = call, 0

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        self.calls += 1
        if self.calls == self.call:
            raise RuntimeError("the judge is out")
        return [float(len(text)) for text in completions]


class TestAFailedRun:
    def config(self, make_config: MakeConfig, folder: Path, reward: Any, **ppo: Any) -> RunConfig:
        return make_config(reward=reward, run={"folder": str(folder)}, ppo={"steps": 4, **ppo})

    def test_the_steps_before_it_are_saved_and_said_and_go_on_bitwise(
        self, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        def whole(completions: list[str], **columns: Any) -> list[float]:
            return [float(len(text)) for text in completions]

        expected = Runner(self.config(make_config, tmp_path / "whole", whole))
        expected.train()
        failing = FailsAt(4)  # the first call is the pre-flight check's, the second and third are steps 1 and 2
        with pytest.raises(PluginError, match=r"the judge is out.*Step 2 is saved: Runner\(config, resume=True\)"):
            Runner(self.config(make_config, tmp_path / "run", failing)).train()
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
        assert lines(tmp_path / "run", "steps.jsonl")[-1]["step"] == 2
        resumed = Runner(self.config(make_config, tmp_path / "run", whole), resume=True, override=True)
        assert resumed.done == 2
        resumed.train()
        for name, tensor in resumed.bank.tensors("policy").items():
            assert torch.equal(tensor, expected.bank.tensors("policy")[name]), name

    def test_before_the_first_step_there_is_nothing_to_say(self, make_config: MakeConfig, tmp_path: Path) -> None:
        with pytest.raises(PluginError) as caught:
            Runner(self.config(make_config, tmp_path / "run", FailsAt(2))).train()
        assert "saved" not in str(caught.value)
        assert "No checkpoint" not in str(caught.value)

    def test_a_failed_update_saves_nothing(
        self, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its weights are of no whole step."""
        runner = Runner(self.config(make_config, tmp_path / "run", FailsAt(0)))
        going = runner.steps()
        next(going)

        def torn(*arguments: Any, **more: Any) -> None:
            raise PluginError("torn.")

        monkeypatch.setattr(runner, "train_on", torn)
        with pytest.raises(PluginError, match=r"torn\..*No checkpoint was written yet .*starts again at step 1"):
            next(going)
        assert not list((tmp_path / "run" / "checkpoints").glob("*"))

    def test_a_resume_without_checkpoint_says_what_it_drops(self, make_config: MakeConfig, tmp_path: Path) -> None:
        config = self.config(make_config, tmp_path / "run", FailsAt(0))
        runner = Runner(config)
        next(runner.steps())
        with pytest.warns(
            MarlWarning, match="starts again at step 1; the step that was recorded in it are dropped|the step"
        ):
            Runner(config, resume=True)


class TestALoopByHand:
    def made(self, make_config: MakeConfig, folder: Path, **ppo: Any) -> Runner:
        config = make_config(reward=FailsAt(0), run={"folder": str(folder)}, ppo={"steps": 2, **ppo})
        runner = Runner(config)
        runner.step(runner.prompts())
        return runner

    def test_steps_that_were_never_saved_are_told(self, make_config: MakeConfig, tmp_path: Path) -> None:
        kept = [self.made(make_config, tmp_path / "run")]

        def let_go() -> None:
            kept.clear()
            gc.collect()

        with pytest.warns(
            MarlWarning, match=r"1 step of this run was never saved\. End a loop by hand with runner\.end"
        ):
            let_go()

    def test_an_ended_loop_says_nothing(
        self, make_config: MakeConfig, tmp_path: Path, recwarn: pytest.WarningsRecorder
    ) -> None:
        runner = self.made(make_config, tmp_path / "run")
        result = runner.end()
        assert runner.end() is result
        assert (tmp_path / "run" / "final" / "policy").is_dir()
        assert json.loads((tmp_path / "run" / "ended.json").read_text())["reason"] == "the loop by hand ended it"
        del runner
        gc.collect()
        assert not [warning for warning in recwarn if "never saved" in str(warning.message)]

    @pytest.mark.parametrize("schedule", ["linear", "cosine"])
    def test_beyond_the_last_step_the_rate_stays_at_the_schedules_end(self, schedule: str) -> None:
        section = PPOSection(steps=2, schedule=schedule)  # type: ignore[arg-type]
        assert [learning_rate_factor(step, section) for step in range(2, 6)] == [0.0] * 4

    def test_that_is_said(self, make_config: MakeConfig, tmp_path: Path) -> None:
        runner = self.made(make_config, tmp_path / "run", schedule="linear")
        runner.step(runner.prompts())
        with pytest.warns(
            MarlWarning, match=r"step 3 is beyond ppo\.steps: 2, where the learning rate's schedule \(linear\)"
        ):
            runner.step(runner.prompts())
        runner.end()


class TestALoopOverSteps:
    def test_it_ends_the_run_and_train_gives_the_result(self, make_config: MakeConfig, tmp_path: Path) -> None:
        config = make_config(reward=FailsAt(0), run={"folder": str(tmp_path / "run")}, ppo={"steps": 2})
        runner = Runner(config)
        last = list(runner.steps())[-1]
        assert (tmp_path / "run" / "final" / "policy").is_dir()
        assert json.loads((tmp_path / "run" / "ended.json").read_text())["how"] == "finished"
        assert 'class="status finished"' in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
        result = runner.train()
        assert result.last is last
        assert runner.train() is result
        assert list(runner.steps()) == []


@pytest.mark.parametrize("given", [{"model": {"path": "m"}}, "run.yaml"])
def test_what_is_no_config_is_told(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"was given, not a config. Give a RunConfig"):
        Runner(given)
