"""What a config says of passes holds wherever something is sampled or scored: step, evaluation, pre-flight check, every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from marl_core import Runner
from marl_core.config.speed_config import usual_tokens
from marl_core.ppo.budget import Budget
from marl_core.ppo.sampling import by_transformers, sampler

MakeConfig = Callable[..., Any]


@pytest.mark.parametrize("decode", ["marl", "transformers"])
def test_who_samples(make_config: MakeConfig, prompts_file: str, monkeypatch: pytest.MonkeyPatch, decode: str) -> None:
    """Steps, evaluations and the pre-flight check: six prompts in two pieces of four, twice, two steps, and the check's two rollouts."""
    calls: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls.append(name)
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(sampler, "decode", noted("marl", vars(sampler)["decode"]))
    monkeypatch.setattr(by_transformers, "generate", noted("transformers", by_transformers.generate))
    Runner(make_config(speed={"decode": decode}, eval={"prompts": prompts_file})).train()
    assert calls == [decode] * (2 + 2 + 2 * 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_of_a_pass(make_config: MakeConfig, dtype: str) -> None:
    """Ranks meet at the sum of gradients, so each has a budget of its own; only layers that are spread need equal passes."""
    runner = Runner(make_config(model={"dtype": dtype}))
    trunk = runner.bank.trunk
    assert runner.algorithm.budget.train.tokens == usual_tokens("cpu", dtype)
    assert Budget.of(runner.config, trunk, ranks=2).train.tokens == usual_tokens("cpu", dtype)
    trunk.sharded = True
    assert Budget.of(runner.config, trunk).train.tokens is None
    trunk.sharded = False
    assert Budget.of(make_config(ppo={"microbatch": 1}), trunk).train.tokens is None
