"""What TRL's GRPO passes to reward functions beside columns: trainer_state, log_metric, log_extra; and every kind of callable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from marl_core import ConfigError, MarlWarning, PluginError, RewardContext, Runner, ScoredRollout, StepStats
from marl_core.ppo.metrics import RESERVED_NAMES, step_stats
from marl_core.ppo.reward_context import Logged, asking, logged, reward_context
from marl_core.testing import fake_rollout
from marl_plugins.reward_function import wrap
from marl_plugins.samples import sample_rows
from marl_plugins.time_limit import with_caller_state

MakeConfig = Callable[..., Any]

FUNCTIONS = """
import asyncio, functools, torch


def progress(completions, trainer_state, log_metric=None, log_extra=None, **kwargs):
    log_metric("share", trainer_state.global_step / trainer_state.max_steps)
    log_metric("grads", torch.is_grad_enabled())
    log_extra("letters", [len(text) for text in completions])
    return [float(len(text)) for text in completions]


async def waits(completions, **kwargs):
    await asyncio.sleep(0)
    kwargs["log_metric"]("share", kwargs["trainer_state"].global_step)
    return [0.0 for _ in completions]


def twice(completions, log_metric, log_extra, **kwargs):
    for value in (1, torch.tensor(2.0), 6):
        log_metric("objective/kl", value)
    log_metric("step", 5)
    log_extra("score", completions)
    log_extra("short", [1])
    return [0.0 for _ in completions]


def no_number(completions, log_metric, **kwargs):
    log_metric("share", "much")
    return [0.0 for _ in completions]


def by_place(prompts, completions, /):
    return [float(len(p) + len(c)) for p, c in zip(prompts, completions)]


def plain(completions, *args):
    return [float(len(args)) for _ in completions]


class Score:
    def __call__(self, completions, weight=1.0, **columns):
        return [weight for _ in completions]


class Async:
    async def __call__(self, completions, **columns):
        return [3.0 for _ in completions]


class NeedsMore:
    def __init__(self, path):
        self.path = path


class Nothing:
    pass


instance, waiting = Score(), Async()
bound = functools.partial(Score().__call__, weight=2.0)
lengths = functools.partial(lambda key, completions: [float(len(c)) for c in completions], "k")
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("asks") / "asks.py"
    file.write_text(FUNCTIONS, encoding="utf-8")
    return str(file)


def ask(target: str, **arguments: Any) -> list[float]:
    found: Any = wrap(target, arguments)(fake_rollout())
    return list(found)


class TestOfTheTrainer:
    @pytest.mark.parametrize("limit", [{}, {"timeout_seconds": 30.0}])
    def test_a_run(self, functions: str, make_config: MakeConfig, tmp_path: Path, limit: dict[str, float]) -> None:
        """The steps that TRL's state counts, from 0; the metric under its own name; the samples' column; no gradients."""
        reward = {"use": "function", "target": f"{functions}:progress", **limit}
        settings = make_config(
            reward=reward, ppo={"steps": 3}, run={"folder": str(tmp_path / "out")}, observers=["json-lines"]
        )
        found = [stats.metrics for stats in Runner(settings).steps()]
        assert [metrics["share"] for metrics in found] == pytest.approx([0, 1 / 3, 2 / 3])
        assert [metrics["grads"] for metrics in found] == [0, 0, 0]
        lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
        assert lines
        assert all(line["letters"] == len(line["response"]) for line in lines)
        steps = [json.loads(line) for line in (tmp_path / "out" / "steps.jsonl").read_text().splitlines()]
        assert [line["share"] for line in steps] == [metrics["share"] for metrics in found]

    def test_two_functions_are_averaged_and_evaluation_is_apart(
        self, functions: str, make_config: MakeConfig, prompts_file: str
    ) -> None:
        reward = [
            {"use": "function", "target": f"{functions}:progress"},
            {"use": "function", "target": f"{functions}:waits"},
        ]
        runner = Runner(make_config(reward=reward, eval={"prompts": prompts_file, "every": 1}, ppo={"steps": 2}))
        found = runner.train()
        assert found.last is not None
        assert found.last["share"] == pytest.approx((1 / 2 + 1) / 2)  # step 1 of 2: one logs the share, one the step
        assert found.before is not None
        assert found.after is not None
        assert found.before.logged["share"]["mean"] == 0.0
        assert found.after.logged["share"]["mean"] == pytest.approx((2 / 2 + 2) / 2)

    def test_the_state_is_trls(self, functions: str) -> None:
        seen: dict[str, Any] = {}

        def keep(completions: list[str], **columns: Any) -> list[float]:
            seen.update(columns)
            return [0.0] * len(completions)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("marl_plugins.reward_function.load", lambda target: keep)
            score = wrap("x:y", {})
        with asking(RewardContext(step=5, steps=20, epoch=1.25, epochs=5.0, first=False)):
            score(fake_rollout())
        from transformers import TrainerState

        state = seen["trainer_state"]
        assert isinstance(state, TrainerState)
        assert (state.global_step, state.max_steps, state.epoch, state.num_train_epochs) == (5, 20, 1.25, 5)
        assert not state.is_world_process_zero

    def test_outside_of_a_run_nothing_is_wrong(self, functions: str) -> None:
        assert ask(f"{functions}:progress") == [6.0, 7.0, 0.0]
        assert reward_context().metrics == {}

    def test_names_that_marl_has_stand_apart(self, functions: str) -> None:
        """In the metrics and in the samples."""
        rollout = fake_rollout()
        with asking(RewardContext()) as context:
            wrap(f"{functions}:twice", {})(rollout)
        with pytest.warns(MarlWarning, match=r"'short', ...\) gave 1 values for 3"):
            found = logged([context.part()], [3])
        assert found.metrics == {"objective/kl": 3.0, "step": 5.0}
        assert found.columns == {"score": list(rollout.texts)}
        scored = ScoredRollout(rollout, torch.zeros(rollout.ids.shape), None, None, torch.zeros(3), logged=found)
        (row,) = sample_rows(StepStats(1, {}), scored, 1)
        assert row["score"] == 0.0
        assert row["logged/score"] == " film."
        assert {"step", "time"} <= RESERVED_NAMES
        metrics = step_stats(1, scored, advantages(scored), update(), 0.1, {}).metrics
        assert metrics["objective/kl"] == 0.0
        assert metrics["logged/objective/kl"] == 3.0
        assert metrics["logged/step"] == 5.0

    def test_what_is_no_number_is_the_functions_fault(self, functions: str) -> None:
        with pytest.raises(PluginError, match=r"log_metric\('share', ...\) takes a number, and got 'much'"):
            ask(f"{functions}:no_number")

    def test_a_data_column_of_that_name_gives_way(self, functions: str) -> None:
        rollout = fake_rollout(rows=[{"trainer_state": 1, "log_metric": 2}] * 3)
        assert list(wrap(f"{functions}:progress", {})(rollout)) == [6.0, 7.0, 0.0]
        with pytest.raises(ConfigError, match="can't be given trainer_state: marl passes these itself"):
            wrap(f"{functions}:progress", {"trainer_state": 1})

    def test_several_processes(self) -> None:
        """Sums and counts, not means of means; a process that logged no such column has None."""
        one, two = RewardContext(), RewardContext()
        for value in (1.0, 2.0):
            one.log_metric("a", value)
        two.log_metric("a", torch.tensor(6.0))
        two.log_metric("b", True)
        one.log_extra("c", torch.tensor([1, 2]))
        found = logged([json.loads(json.dumps(each.part())) for each in (one, two)], [2, 2])
        assert found == Logged({"a": 3.0, "b": 1.0}, {"c": [1, 2, None, None]})


def advantages(scored: ScoredRollout) -> Any:
    from marl_core.ppo.types import Advantages

    nothing = torch.zeros(scored.rollout.ids.shape)
    return Advantages(nothing, nothing, nothing, None)


def update() -> Any:
    from dataclasses import fields

    from marl_core.ppo.types import UpdateStats

    return UpdateStats(**{item.name: 0.0 for item in fields(UpdateStats)})


class TestCallables:
    @pytest.mark.parametrize(
        ("name", "wanted"),
        [
            ("by_place", [12.0, 10.0, 2.0]),
            ("plain", [0.0, 0.0, 0.0]),
            ("instance", [1.0, 1.0, 1.0]),
            ("Score", [1.0, 1.0, 1.0]),
            ("waiting", [3.0, 3.0, 3.0]),
            ("bound", [2.0, 2.0, 2.0]),
            ("lengths", [6.0, 7.0, 0.0]),
        ],
    )
    def test_of_every_kind(self, functions: str, name: str, wanted: list[float]) -> None:
        assert ask(f"{functions}:{name}") == wanted

    def test_a_builtin_that_says_nothing_of_its_arguments(self) -> None:
        """It gets all by name, and what it says of that is told."""
        with pytest.raises(TypeError):
            ask("builtins:min")

    @pytest.mark.parametrize(
        ("name", "message"), [("NeedsMore", "Make an instance in that module"), ("Nothing", "a class without __call__")]
    )
    def test_classes_that_are_no_reward(self, functions: str, name: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            wrap(f"{functions}:{name}", {})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_another_thread_has_the_callers_modes(mode: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def seen() -> tuple[bool, bool, int]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), reward_context().step

    with mode(), asking(RewardContext(step=7)), ThreadPoolExecutor(1) as pool:
        assert pool.submit(with_caller_state(seen)).result() == seen()
        assert seen()[2] == 7


def test_an_awaited_function_in_a_running_loop(functions: str) -> None:
    """As in a notebook: it runs in a thread of its own, under the caller's conditions."""
    import asyncio

    async def cell() -> RewardContext:
        with asking(RewardContext(step=4)) as context:
            wrap(f"{functions}:waits", {})(fake_rollout())
            return context

    assert asyncio.run(cell()).metrics == {"share": [4.0]}
