"""Learning rates by role, and the schedule worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from marl_core.config.run_config import PPOSection, RunConfig
from marl_core.errors import ConfigError
from marl_core.run.optimizer import learning_rate_factor, make_optimizer, set_learning_rates


def factors(**options: Any) -> list[float]:
    ppo = PPOSection.model_validate(options)
    return [learning_rate_factor(step, ppo) for step in range(ppo.steps)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 3}, [1, 1, 1]),
        ({"steps": 4, "schedule": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"steps": 4, "schedule": "cosine"}, [1, 0.8535534, 0.5, 0.1464466]),  # (1 + cos(pi / 4)) / 2 = 0.8535534
        ({"steps": 5, "warmup_steps": 2}, [0.5, 1, 1, 1, 1]),
        ({"steps": 6, "warmup_steps": 2, "schedule": "linear"}, [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ({"steps": 6, "warmup_steps": 2, "schedule": "cosine"}, [0.5, 1, 1, 0.8535534, 0.5, 0.1464466]),
        ({"steps": 2, "warmup_steps": 4}, [0.25, 0.5]),
        ({"steps": 2, "warmup_steps": 2, "schedule": "linear"}, [0.5, 1]),
    ],
)
def test_schedule(options: dict[str, Any], expected: list[float]) -> None:
    assert factors(**options) == pytest.approx(expected, abs=1e-7)


def optimizer(value: dict[str, Any], **ppo: Any) -> torch.optim.AdamW:
    written = {"model": {"path": "tiny"}, "reference": "r", "reward": "r", "ppo": ppo, "value": value}
    roles = {role: {"w": torch.nn.Parameter(torch.ones(2))} for role in ("policy", "value")}
    return make_optimizer(roles, RunConfig.model_validate(written))


def test_each_role_has_its_learning_rate() -> None:
    groups = optimizer({"learning_rate": 3e-3}, learning_rate=1e-4).param_groups
    assert [(group["role"], group["lr"], group["initial_lr"]) for group in groups] == [
        ("policy", 1e-4, 1e-4),
        ("value", 3e-3, 3e-3),
    ]
    same = optimizer({}, learning_rate=1e-4).param_groups
    assert [group["lr"] for group in same] == [1e-4, 1e-4]


def test_adamw_settings_arrive() -> None:
    group = optimizer({}, adam_betas=[0.5, 0.6], adam_eps=1e-3, weight_decay=0.1).param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.5, 0.6), 1e-3, 0.1)


def test_one_step_by_hand() -> None:
    # AdamW's first step: w (1 - lr wd) - lr g / (|g| + eps) with g = 2, lr 0.1, wd 0.5, eps 0.5: 0.95 - 0.1 * 2 / 2.5 = 0.87
    made = optimizer({}, learning_rate=0.1, weight_decay=0.5, adam_eps=0.5)
    weight = made.param_groups[0]["params"][0]
    weight.grad = torch.full((2,), 2.0)
    made.step()
    torch.testing.assert_close(weight.detach(), torch.full((2,), 0.87))


class TestFactors:
    """A part of an adapter may learn faster: `rates` of its strategy."""

    def made(self, factors: dict[str, dict[str, float]]) -> torch.optim.AdamW:
        written = {"model": {"path": "tiny"}, "reference": "r", "reward": "r", "ppo": {"learning_rate": 1e-3}}
        names = ("q.lora_A.policy.weight", "q.lora_B.policy.weight", "up.lora_A.policy.weight")
        roles = {"policy": {name: torch.nn.Parameter(torch.ones(2)) for name in names}}
        return make_optimizer(roles, RunConfig.model_validate(written), factors)

    def test_groups_by_factor_the_roles_own_first(self) -> None:
        groups = self.made({"policy": {"lora_B": 16.0}}).param_groups
        assert [(group["lr"], len(group["params"])) for group in groups] == [(1e-3, 2), (16e-3, 1)]
        assert [group["role"] for group in groups] == ["policy", "policy"]

    def test_the_schedule_keeps_the_factor(self) -> None:
        optimizer = self.made({"policy": {"lora_B": 16.0}})
        set_learning_rates(optimizer, 3, PPOSection(steps=4, schedule="linear"))
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25e-3, 4e-3])

    def test_one_step_of_adamw_moves_by_rate_times_factor(self) -> None:
        optimizer = self.made({"policy": {"lora_B": 16.0}})
        slow, fast = (group["params"][0] for group in optimizer.param_groups)
        for parameter in (slow, fast):
            parameter.grad = torch.ones(2)
        optimizer.step()
        # Adam's first step is the rate in each number, whatever the gradient's size
        assert 1 - slow[0].item() == pytest.approx(1e-3, rel=1e-2)
        assert 1 - fast[0].item() == pytest.approx(16e-3, rel=1e-2)

    def test_without_factors_there_is_one_group(self) -> None:
        assert [len(group["params"]) for group in self.made({}).param_groups] == [3]

    def test_a_part_that_no_parameter_has(self) -> None:
        with pytest.raises(ConfigError, match=r"policy: .* to lora_C, and no parameter has that in its name"):
            self.made({"policy": {"lora_C": 2.0}})

    def test_a_part_is_whole(self) -> None:
        with pytest.raises(ConfigError, match="lora_"):
            self.made({"policy": {"lora_": 2.0}})
