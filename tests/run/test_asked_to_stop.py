"""A strategy, or whoever has the Runner, asks the run to stop: it ends like a finished one. ended.json says how a run ended."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import PrivateAttr

from marl_core import (
    ConfigError,
    MarlDeprecationWarning,
    MarlWarning,
    PluginError,
    RunConfig,
    Runner,
    RunResult,
    StopRun,
    Strategy,
    hookimpl,
)
from marl_core.cli.app import main
from marl_core.errors import Stopped
from marl_core.store import ended

MakeConfig = Callable[..., RunConfig]


class Asks(Strategy):
    """Asks at one hook, once, and hears of the end."""

    hook: str = "step_end"
    step: int = 2
    _heard: list[Any] = PrivateAttr(default_factory=list)

    def _asked(self, hook: str, step: int) -> StopRun | None:
        return StopRun(f"enough at {hook} {step}") if (hook, step) == (self.hook, self.step) else None

    @hookimpl
    def marl_run_start(self, done: int) -> StopRun | None:
        return self._asked("run_start", done)

    @hookimpl
    def marl_update_end(self, step: int) -> StopRun | None:
        return self._asked("update_end", step)

    @hookimpl
    def marl_step_end(self, stats: Any) -> StopRun | None:
        return self._asked("step_end", stats.step)

    @hookimpl
    def marl_evaluation_end(self, evaluation: Any, bank: Any, policy: str) -> StopRun | None:
        assert policy in bank.adapters
        self._heard.append(("evaluation", evaluation.step))
        return self._asked("evaluation_end", evaluation.step)

    @hookimpl
    def marl_run_end(self, result: RunResult) -> None:
        self._heard.append(("end", result.steps, result.stopped))

    @hookimpl
    def marl_run_failed(self, step: int) -> None:
        self._heard.append(("failed", step))


@pytest.fixture
def config(make_config: MakeConfig, prompts_file: str, tmp_path: Path) -> MakeConfig:
    def make(observer: Strategy, **changes: Any) -> RunConfig:
        settings: dict[str, Any] = {
            "ppo": {"steps": 4},
            "eval": {"prompts": prompts_file, "every": 2, "limit": 2},
            "run": {"folder": str(tmp_path / "run")},
            **changes,
        }
        return make_config(observers=[observer, "json-lines"], **settings)

    return make


def end(folder: Path) -> tuple[str, str, int]:
    found = json.loads((folder / "run" / "ended.json").read_text(encoding="utf-8"))
    assert found.pop("time") > 1e9
    return found["how"], found["reason"], found["step"]


@pytest.mark.parametrize(
    ("hook", "step", "evaluations"),
    [
        ("run_start", 0, [0]),
        ("evaluation_end", 0, [0]),
        ("update_end", 1, [0, 1]),
        ("step_end", 1, [0, 1]),
        ("step_end", 2, [0, 2]),
        ("evaluation_end", 2, [0, 2]),
        ("step_end", 3, [0, 2, 3]),
    ],
)
def test_it_ends_after_the_step_as_a_finished_run(
    config: MakeConfig, tmp_path: Path, hook: str, step: int, evaluations: list[int]
) -> None:
    observer = Asks(hook=hook, step=step)
    result = Runner(config(observer)).train()
    reason = f"enough at {hook} {step} (Asks of {__name__})"
    assert (result.steps, result.stopped) == (step, reason)
    assert observer._heard == [*(("evaluation", number) for number in evaluations), ("end", step, reason)]
    assert result.after is not None
    assert result.after.step == step
    run = tmp_path / "run"
    assert (run / "final" / "policy" / "adapter_model.safetensors").is_file()
    assert (run / "report.html").is_file()
    assert [path.name for path in (run / "checkpoints").glob("*")] == ([f"step-{step:06d}"] if step else [])
    assert end(tmp_path) == ("stopped", reason, step)


def test_all_steps_done_is_finished_whatever_was_asked(config: MakeConfig, tmp_path: Path) -> None:
    result = Runner(config(Asks(hook="step_end", step=4))).train()
    assert (result.steps, result.stopped) == (4, None)
    assert end(tmp_path) == ("finished", "all steps are done", 4)


def test_resumed_it_goes_on_and_is_what_it_would_have_been(
    config: MakeConfig, make_config: MakeConfig, tmp_path: Path
) -> None:
    Runner(config(Asks(hook="step_end", step=2))).train()
    again = Runner(config(Asks(hook="none")), resume=True)
    assert again.folder is not None
    assert (
        f"this run was stopped after step 2: enough at step_end 2 (Asks of {__name__}); now it goes on"
        in again.folder.notes
    )
    steps = again.steps()
    next(steps)
    assert not (tmp_path / "run" / "ended.json").exists()  # it is going
    del steps, again
    assert Runner(config(Asks(hook="none")), resume=True).train().steps == 4
    assert end(tmp_path)[0] == "finished"
    whole = config(Asks(hook="none"), run={"folder": str(tmp_path / "whole")})
    Runner(whole).train()
    weights = [tmp_path / name / "final/policy/adapter_model.safetensors" for name in ("run", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_loop_of_ones_own_may_ask(config: MakeConfig, tmp_path: Path) -> None:
    runner = Runner(config(Asks(hook="none")))
    seen = []
    for stats in runner.steps():
        seen.append(stats.step)
        if stats.step == 3:
            runner.request_stop("seen enough")
            runner.request_stop("the second reason is not told")
    assert seen == [1, 2, 3]
    assert runner.stopped == "seen enough"
    assert end(tmp_path) == ("stopped", "seen enough", 3)
    assert (tmp_path / "run" / "checkpoints" / "step-000003").is_dir()
    assert runner.train().steps == 4  # what was asked for is done: asked again, it goes on
    assert end(tmp_path)[0] == "finished"


def test_asked_before_the_first_step(config: MakeConfig) -> None:
    runner = Runner(config(Asks(hook="none")))
    runner.request_stop("changed my mind")
    result = runner.train()
    assert (result.steps, result.stopped, result.last) == (0, "changed my mind", None)


def test_only_a_stop_run_stops(config: MakeConfig) -> None:
    class Chatty(Strategy):
        """Gives things that mean nothing."""

        said: Any

        @hookimpl
        def marl_step_end(self, stats: Any) -> Any:
            return self.said

    def run(said: object) -> Runner:
        return Runner(config(Chatty(said=said)).with_changes("run.folder", None))

    assert run(None).train().steps == 4
    for said, what in ((True, "a bool"), ("stop", "a str"), (StopRun, "a type")):
        with pytest.raises(PluginError, match=f"marl_step_end gave {what}, expected None or a marl_core.StopRun"):
            run(said).train()


def test_the_command_line_says_why_and_ends_well(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from marl_core import dump_config
    from marl_plugins.observers import JsonLines

    monkeypatch.setattr(JsonLines, "marl_step_end", hookimpl(lambda self, stats: StopRun("a [bold] reason")))
    file = tmp_path / "run.yaml"
    folder = tmp_path / "run"
    file.write_text(
        dump_config(make_config(run={"folder": str(folder)}, observers=["console", "json-lines"])), encoding="utf-8"
    )
    assert main(["run", str(file)]) == 0
    assert "stopped after step 1 of 2: a [bold] reason (json-lines of marl-core" in capsys.readouterr().out


class TestEnded:
    """ended.json, for each way in which a run ends."""

    def test_an_error(self, config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Breaks(Strategy):
            """Fails at the second step."""

            @hookimpl
            def marl_step_end(self, stats: Any) -> None:
                if stats.step == 2:
                    raise ValueError("with hf_aaaaaaaaaaaaaaaaaaaaaaaa")

        with pytest.raises(PluginError):
            Runner(config(Breaks())).train()
        how, reason, step = end(tmp_path)
        assert (how, step) == ("failed", 2)
        assert reason.startswith("PluginError: ")
        assert "Breaks of " in reason
        assert "hf_aaaa" not in reason

    def test_a_signal(self, config: MakeConfig, tmp_path: Path) -> None:
        import os
        import signal

        class Kills(Strategy):
            """Ctrl-C."""

            @hookimpl
            def marl_step_end(self) -> None:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(Stopped, match=r"Go on with Runner\(config, resume=True\)"):
            Runner(config(Kills())).train()
        assert end(tmp_path) == ("interrupted", "SIGINT", 1)

    def test_a_loop_that_was_left(self, config: MakeConfig, tmp_path: Path) -> None:
        runner = Runner(config(Asks(hook="none")))
        for _ in runner.steps():
            break
        assert end(tmp_path) == ("interrupted", "the loop over its steps was left", 1)
        steps = runner.steps()
        next(steps)
        assert not (tmp_path / "run" / "ended.json").exists()

    def test_a_refused_resume_leaves_what_was_said(self, config: MakeConfig, tmp_path: Path) -> None:
        Runner(config(Asks(hook="step_end", step=1))).train()
        before = end(tmp_path)
        with pytest.raises(ConfigError):
            Runner(config(Asks(hook="none"), policy={"r": 2}), resume=True)
        assert end(tmp_path) == before

    def test_who_lost_the_folder_says_nothing(self, config: MakeConfig, tmp_path: Path) -> None:
        first = Runner(config(Asks(hook="none"), run={"folder": str(tmp_path / "run"), "checkpoint_every": 1}))
        steps = first.steps()
        next(steps)
        second = Runner(
            config(Asks(hook="none"), run={"folder": str(tmp_path / "run"), "checkpoint_every": 1}), resume=True
        )
        with pytest.raises(ConfigError, match="taken over"):
            next(steps)
        assert not (tmp_path / "run" / "ended.json").exists()
        second.train()

    def test_a_full_disk_is_a_warning(
        self, config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(ended, "write_json", full)
        with pytest.warns(MarlWarning, match=r"ended.json: how the run ended can't be written .*No space left"):
            assert Runner(config(Asks(hook="none"))).train().steps == 4

    def test_a_damaged_one_is_no_reason_to_stop(self, config: MakeConfig, tmp_path: Path) -> None:
        Runner(config(Asks(hook="step_end", step=1))).train()
        for text in ("{", "[]", '{"how": 1}'):
            (tmp_path / "run" / "ended.json").write_text(text, encoding="utf-8")
            assert ended.stop_note(tmp_path / "run") == []


def test_the_old_name_of_the_evaluation_hook_still_hears(config: MakeConfig) -> None:
    heard: list[int] = []

    class Old(Strategy):
        """Written before the hook was renamed."""

        @hookimpl
        def marl_evaluation(self, evaluation: Any) -> None:
            heard.append(evaluation.step)

    with pytest.warns(
        MarlDeprecationWarning, match=r"Old of .*: the hook marl_evaluation is deprecated .*: use marl_evaluation_end"
    ):
        Runner(config(Old())).train()
    assert heard == [0, 2, 4]


def test_the_new_name_warns_of_nothing(config: MakeConfig) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MarlDeprecationWarning)
        Runner(config(Asks(hook="none"))).train()
