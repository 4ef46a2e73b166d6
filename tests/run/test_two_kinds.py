"""Two policies of different kinds on one bank, stepped in turns: each makes the very steps that it makes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from marl_core import Runner

MakeConfig = Callable[..., Any]
FIRST, SECOND = {"use": "oft", "block": 8}, {"use": "dora", "r": 4, "alpha": 8}


def losses(runner: Runner) -> list[float]:
    return [stats.metrics["policy/loss"] for stats in runner.steps()]


def test_two_policies_of_two_kinds(make_config: MakeConfig) -> None:
    alone = [Runner(make_config(policy=policy)) for policy in (FIRST, SECOND)]
    wanted = [losses(runner) for runner in alone]
    first = Runner(make_config(policy=FIRST))
    second = Runner(make_config(policy=SECOND), bank=first.bank, policy="second")
    found: list[list[float]] = [[], []]
    for one, other in zip(first.steps(), second.steps(), strict=True):
        found[0].append(one.metrics["policy/loss"])
        found[1].append(other.metrics["policy/loss"])
    assert found == wanted
    mine, theirs = first.bank.tensors("policy"), alone[0].bank.tensors("policy")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    mine, theirs = first.bank.tensors("second"), alone[1].bank.tensors("policy")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
