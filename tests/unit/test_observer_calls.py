"""Who was told that a run began is told how it ended: whole, by an error, by a signal, or because nobody asked on."""

from __future__ import annotations

import gc
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import PrivateAttr
from rich.console import Console

from marl_core import Evaluation, MarlWarning, Plan, PluginError, RunConfig, Runner, RunResult, Strategy, hookimpl
from marl_core.errors import Stopped

MakeConfig = Callable[..., RunConfig]


class Ear(Strategy):
    """Hears everything; raises at one hook if asked to."""

    raises: str = ""
    _heard: list[Any] = PrivateAttr(default_factory=list)

    def _hear(self, hook: str, *what: Any) -> None:
        self._heard.append((hook, *what))
        if hook == self.raises:
            raise ValueError(f"{hook} is deaf")

    @hookimpl
    def marl_run_start(self, done: int) -> None:
        self._hear("start", done)

    @hookimpl
    def marl_step_end(self, stats: Any) -> None:
        self._hear("step", stats.step)

    @hookimpl
    def marl_evaluation_end(self, evaluation: Evaluation) -> None:
        self._hear("evaluation", evaluation.step)

    @hookimpl
    def marl_run_end(self, result: RunResult) -> None:
        self._hear("end", result.steps)

    @hookimpl
    def marl_run_failed(self, step: int, error: BaseException) -> None:
        self._hear("failed", step, type(error))


@pytest.fixture
def ears() -> tuple[Ear, Ear]:
    return Ear(), Ear()


def config(make_config: MakeConfig, ears: tuple[Ear, ...], **changes: Any) -> RunConfig:
    return make_config(observers=list(ears), ppo={"steps": 3}, **changes)


def test_a_whole_run(make_config: MakeConfig, ears: tuple[Ear, Ear], prompts_file: str, tmp_path: Path) -> None:
    evaluated = {"eval": {"prompts": prompts_file, "every": 2, "limit": 2}, "run": {"folder": str(tmp_path / "run")}}
    Runner(config(make_config, ears, **evaluated)).train()
    steps = [("step", 1), ("step", 2), ("evaluation", 2), ("step", 3), ("evaluation", 3)]
    for ear in ears:
        assert ear._heard == [("start", 0), ("evaluation", 0), *steps, ("end", 3)]
    Runner(config(make_config, (Ear(), last := Ear()), **evaluated), resume=True).train()
    assert last._heard == [("start", 3), ("evaluation", 3), ("end", 3)]


def broken(step: int) -> Callable[..., Any]:
    """A step that fails when it is the turn of this one."""
    real = Runner.update

    def update(self: Runner, *given: Any) -> Any:
        if self.done + 1 == step:
            raise OSError("the disk is gone")
        return real(self, *given)

    return update


@pytest.mark.parametrize("how", ["train", "steps"])
def test_an_error(make_config: MakeConfig, ears: tuple[Ear, Ear], monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(Runner, "update", broken(2))
    runner = Runner(config(make_config, ears))
    with pytest.raises(OSError, match="the disk is gone"):
        runner.train() if how == "train" else list(runner.steps())
    for ear in ears:
        assert ear._heard == [("start", 0), ("step", 1), ("failed", 1, OSError)]


def test_an_error_before_the_run_began_is_told_to_nobody(
    make_config: MakeConfig, ears: tuple[Ear, Ear], tmp_path: Path
) -> None:
    (tmp_path / "silent.py").write_text("def silent(completions, **columns):\n    return []\n")
    reward = {"use": "function", "target": f"{tmp_path}/silent.py:silent"}
    with pytest.raises(PluginError):
        Runner(make_config(observers=list(ears), reward=reward)).train()
    assert [ear._heard for ear in ears] == [[], []]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal(make_config: MakeConfig, ears: tuple[Ear, Ear], number: signal.Signals) -> None:
    class Presses(Strategy):
        """Ctrl-C in the second step."""

        @hookimpl
        def marl_step_end(self, stats: Any) -> None:
            if stats.step == 2:
                os.kill(os.getpid(), number)

    with pytest.raises(Stopped):
        Runner(make_config(observers=[Presses(), *ears], ppo={"steps": 3})).train()
    for ear in ears:
        assert ear._heard == [("start", 0), ("step", 1), ("step", 2), ("failed", 2, Stopped)]


def test_an_iterator_that_is_given_up_and_asked_for_again(make_config: MakeConfig, ears: tuple[Ear, Ear]) -> None:
    runner = Runner(config(make_config, ears))
    for stats in runner.steps():
        if stats.step == 2:
            break
    gc.collect()
    given_up = [("start", 0), ("step", 1), ("step", 2), ("failed", 2, GeneratorExit)]
    assert [ear._heard for ear in ears] == [given_up, given_up]
    assert [stats.step for stats in runner.steps()] == [3]
    assert [ear._heard[4:] for ear in ears] == [[("start", 2), ("step", 3), ("end", 3)]] * 2
    runner.train()  # nothing is left, not even the end
    assert [ear._heard[7:] for ear in ears] == [[], []]


@pytest.mark.parametrize("hook", ["start", "evaluation", "step"])
def test_an_observer_that_raises(make_config: MakeConfig, prompts_file: str, hook: str) -> None:
    """It ends the run; it and the others hear of that, once."""
    deaf, ear = Ear(raises=hook), Ear()
    with pytest.raises(PluginError, match=f"{hook} is deaf"):
        Runner(config(make_config, (deaf, ear), eval={"prompts": prompts_file, "limit": 2})).train()
    for each in (deaf, ear):
        assert [what for what in each._heard if what[0] in ("failed", "end")] == [each._heard[-1]]
        assert each._heard[-1][::2] == ("failed", PluginError)


def test_what_is_raised_at_the_failure_is_a_warning(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first cause is what the run ends with, and the others hear of it."""
    monkeypatch.setattr(Runner, "update", broken(1))
    deaf, ear = Ear(raises="failed"), Ear()
    with pytest.raises(OSError, match="the disk is gone"), pytest.warns(MarlWarning, match="failed is deaf"):
        Runner(config(make_config, (deaf, ear))).train()
    assert ear._heard[-1] == ("failed", 0, OSError)


def test_at_the_end_all_hear_it_before_one_may_raise(make_config: MakeConfig) -> None:
    deaf, ear = Ear(raises="end"), Ear()
    with pytest.raises(PluginError, match="end is deaf"):
        Runner(config(make_config, (deaf, ear))).train()
    assert deaf._heard[-1] == ear._heard[-1] == ("end", 3)  # the run is whole: nobody hears of a failure too


SHOWN, HIDDEN = "\x1b[?25h", "\x1b[?25l"


@pytest.mark.parametrize("how", ["error", "given up", "all steps"])
def test_the_cursor_is_shown_again(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    out = io.StringIO()
    monkeypatch.setattr("marl_plugins.screen.Console", lambda: Console(file=out, force_terminal=True, width=140))
    runner = Runner(make_config(observers=["console"], ppo={"steps": 2}))
    if how == "error":
        monkeypatch.setattr(Runner, "update", broken(2))
        with pytest.raises(OSError, match="the disk is gone"):
            runner.train()
    else:
        for _ in runner.steps():
            assert out.getvalue().rfind(HIDDEN) > out.getvalue().rfind(SHOWN) or how == "all steps"
            if how == "given up":
                break
    assert HIDDEN in out.getvalue()
    assert out.getvalue().rfind(SHOWN) > out.getvalue().rfind(HIDDEN)


def test_two_runs_from_one_plan_watch_their_own_calls(make_config: MakeConfig) -> None:
    plan = Plan.of(make_config())
    around = plan.hooks.around
    first = Runner(plan)
    second = Runner(plan)
    assert first.plan.hooks.around == first.guard.call
    assert second.plan.hooks.around == second.guard.call
    assert plan.hooks.around is around
    next(first.steps())
    assert first.guard.last != "none"
