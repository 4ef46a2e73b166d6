"""Several policies on one base: two Runners share a bank, train in turn, and each ends as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from marl_core import ConfigError, RunConfig, Runner, StepStats

MakeConfig = Callable[..., RunConfig]


def numbers(runner: Runner) -> dict[str, Tensor]:
    """Weights and optimizer state of one policy and its value function."""
    named = {
        f"{role}/{name}": p
        for role, found in runner.roles.trained.parameters(runner.bank).items()
        for name, p in found.items()
    }
    moments = {f"{name}|{key}": value for name, p in named.items() for key, value in runner.optimizer.state[p].items()}
    return {name: tensor.detach().clone() for name, tensor in {**named, **moments}.items()}


def plain(stats: StepStats) -> dict[str, float]:
    return {name: value for name, value in stats.metrics.items() if not name.startswith("perf/")}


@pytest.fixture
def configs(make_config: MakeConfig, rewards_file: str, reward_adapter: str) -> list[RunConfig]:
    """Different rewards, value functions, seeds, sizes; the first one shares the reward adapter with the base."""
    return [
        make_config(ppo={"steps": 3}, run={"seed": 1}, reward={"use": "adapter", "path": reward_adapter}),
        make_config(ppo={"steps": 3}, run={"seed": 2}, policy={"r": 2, "dropout": 0.2}, value={"on": "own", "r": 2},
                    reward={"use": "function", "target": f"{rewards_file}:brevity"}),
    ]  # fmt: skip


def test_training_in_turn_is_training_alone(
    configs: list[RunConfig], base_state: Callable[[Any], dict[str, Tensor]]
) -> None:
    names = ["left", "right"]
    alone = [Runner(config, policy=name) for config, name in zip(configs, names, strict=True)]
    alone_stats = [[plain(stats) for stats in runner.steps()] for runner in alone]

    first = Runner(configs[0], policy="left")
    shared = [first, Runner(configs[1], policy="right", bank=first.bank)]
    assert shared[1].bank is first.bank
    base = base_state(first.bank)
    turns: list[Iterator[StepStats]] = [runner.steps() for runner in shared]
    stats = [[plain(next(turn)) for turn in turns] for _ in range(3)]

    for index in (0, 1):
        assert [both[index] for both in stats] == alone_stats[index]
        expected, found = numbers(alone[index]), numbers(shared[index])
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), names[index]
    assert all(torch.equal(tensor, base[name]) for name, tensor in base_state(first.bank).items())
    assert first.bank.adapters == ["left", "reward", "right", "right-value"]
    assert first.bank.trainable == {"left", "right", "right-value"}


def test_one_at_rest_is_not_touched(configs: list[RunConfig]) -> None:
    first = Runner(configs[0], policy="left")
    second = Runner(configs[1], policy="right", bank=first.bank)
    next(first.steps())
    before = numbers(first)
    assert len(list(second.steps())) == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in numbers(first).items())


def test_a_policys_name_is_taken_once(configs: list[RunConfig]) -> None:
    first = Runner(configs[0])
    with pytest.raises(ConfigError, match=r"already has an adapter 'policy'; give this Runner another name"):
        Runner(configs[1], bank=first.bank)
    assert first.bank.adapters == ["policy", "reward"]


def test_a_reference_that_needs_another_base_is_refused(
    configs: list[RunConfig], make_config: MakeConfig, sft_adapter: str
) -> None:
    first = Runner(configs[0])
    merged = make_config(reference={"use": "merged-base", "adapter": sft_adapter})
    with pytest.raises(ConfigError, match="Runners that share a bank need references that leave the base the same"):
        Runner(merged, bank=first.bank, policy="other")


def test_two_runners_on_a_merged_base(make_config: MakeConfig, sft_adapter: str) -> None:
    first = Runner(make_config(reference={"use": "merged-base", "adapter": sft_adapter}))
    second = Runner(
        make_config(reference={"use": "merged-base", "adapter": sft_adapter}), bank=first.bank, policy="other"
    )
    assert len(list(second.steps())) == 2
