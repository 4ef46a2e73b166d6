"""Runs whose policy and value are adapters of other kinds than a plain LoRA: trained, logged, resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from marl_core import ConfigError, Runner

MakeConfig = Callable[..., Any]


def test_lora_plus_and_a_value_of_another_kind_resume_exactly(make_config: MakeConfig, tmp_path: Path) -> None:
    def config(folder: str) -> Any:
        return make_config(
            policy={"r": 4, "alpha": 8, "plus": 4.0},
            value={"on": "own", "use": "ia3", "learning_rate": 0.02},
            run={"folder": str(tmp_path / folder), "checkpoint_every": 1},
            ppo={"steps": 2, "learning_rate": 1e-3},
        )

    whole = Runner(config("whole"))
    groups = [(group["role"], group["lr"]) for group in whole.optimizer.param_groups]
    assert groups == [("policy", 1e-3), ("policy", 4e-3), ("value", 0.02)]
    result = whole.train()
    assert result.last is not None
    assert result.last["policy/learning_rate"] == pytest.approx(1e-3)
    steps: Any = Runner(config("half")).steps()
    next(steps)
    steps.close()
    resumed = Runner(config("half"), resume=True)
    resumed.train()
    for name in ("policy", "policy-value"):
        tensors = resumed.bank.tensors(name)
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in whole.bank.tensors(name).items())


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (
            {"use": "ia3", "dropout": 0.1},
            "policy.dropout: 0.1, and adapters of the kind IA3 have none",
        ),
        ({"use": "oft", "targets": ["no_proj"]}, "policy.targets: 'no_proj': no such layer"),
        ({"use": "miss", "r": 4096}, "policy.r: 4096 is more than .*, the layer's inputs. Layer model"),
        ({"use": "lora", "lora": {"no_such": 1}}, "policy: peft's config of lora doesn't accept"),
        ({"use": "lora", "r": 4, "lora": {"r": 8}}, "policy.lora.r: write policy.r instead"),
        ({"use": "lora", "init": "gaussian", "lora": {"init_lora_weights": True}}, "init says the same"),
        ({"use": "lora", "ranks": {"(": 4}}, "is neither the end of a layer's name nor a regular expression"),
        ({"use": "peft", "kind": "vera", "vera_dropout": 0.1}, "write policy.dropout instead"),
        ({"use": "peft", "kind": "boft", "boft_n_butterfly_factor": 2}, "peft doesn't pass it on to its layers"),
    ],
)
def test_what_a_kind_can_not_do_is_told(make_config: MakeConfig, policy: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Runner(make_config(policy=policy))


def test_the_runs_seed_is_that_of_parts_nobody_trains(make_config: MakeConfig) -> None:
    def projections(seed: int) -> Any:
        runner = Runner(make_config(policy={"use": "peft", "kind": "vera", "r": 4}, run={"seed": seed}))
        return next(tensor for name, tensor in runner.bank.tensors("policy").items() if "vera_A" in name)

    assert torch.equal(projections(1), projections(1))
    assert not torch.equal(projections(1), projections(2))
