"""A stranger's kind of adapter: a learned bias on each layer, in a package of its own with a tuner of its own, from check to resume."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from marl_core import Catalog, Plan, Runner, load_config
from marl_core.cli.app import main
from marl_core.testing import check_strategy

Stranger = Callable[..., Path]
MakeConfig = Callable[..., Any]

LAYERS = '''
"""The tuner, as PEFT's own are written: imported when an adapter is made, not before."""

from dataclasses import dataclass

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn


@dataclass
class ShiftConfig(PeftConfig):
    target_modules: set[str] | list[str] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = "SHIFT"


class ShiftLayer(nn.Module, BaseTunerLayer):
    adapter_layer_names = ("shift_bias",)

    def __init__(self, base_layer, adapter_name):
        super().__init__()
        self.base_layer, self.merged_adapters, self._disable_adapters = base_layer, [], False
        self.shift_bias = nn.ParameterDict({adapter_name: nn.Parameter(torch.zeros(base_layer.out_features))})
        self._active_adapter = adapter_name

    def forward(self, x):
        out = self.base_layer(x)
        return out if self._disable_adapters else out + self.shift_bias[self.active_adapters[0]].to(out.dtype)


class ShiftModel(BaseTuner):
    prefix, tuner_layer_cls, target_module_mapping = "shift_", ShiftLayer, {}

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key):
        self._replace_module(parent, target_name, ShiftLayer(target, adapter_name), target)


PEFT_TYPE_TO_CONFIG_MAPPING["SHIFT"] = ShiftConfig
PEFT_TYPE_TO_TUNER_MAPPING["SHIFT"] = ShiftModel
PEFT_TYPE_TO_PREFIX_MAPPING["SHIFT"] = "shift_"
'''
SHIFT = '''
from marl_core import Adapter, Strategy, hookimpl


class Shift(Strategy):
    """A learned bias on each layer."""

    @hookimpl
    def marl_adapter(self, layers):
        return Adapter(self._config, learned=sum(out for out, _ in layers.values()), kept=0.7, packed={"bnb-4bit"})

    def _config(self):
        from acme_shift_layers import ShiftConfig

        return ShiftConfig()
'''


@pytest.fixture
def shift(stranger: Stranger) -> Iterator[None]:
    stranger("acme-shift-layers", LAYERS)
    stranger("acme-shift", SHIFT, adapter={"shift": "Shift"})
    yield
    if "peft.mapping" in sys.modules:
        from peft import mapping

        tables: list[dict[Any, Any]] = [
            mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
            mapping.PEFT_TYPE_TO_TUNER_MAPPING,
            mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
        ]
        for table in tables:
            table.pop("SHIFT", None)


def test_it_keeps_the_contract(shift: None) -> None:
    check_strategy("adapter", Catalog.installed().load("adapter", "shift").build({}))


def test_from_check_to_a_run_that_is_resumed_and_continued(
    shift: None, make_config: MakeConfig, tmp_path: Path
) -> None:
    def config(folder: str, **policy: Any) -> Any:
        run = {"folder": str(tmp_path / folder), "checkpoint_every": 1}
        return make_config(policy=policy, run=run, ppo={"steps": 2})

    plan = Plan.of(config("run", use="shift", targets=["q_proj", "up_proj"]))
    assert plan.check() == []
    assert plan.policy_adapter is not None
    said = next(role.weights for role in plan.describe() if role.name == "policy")
    assert said == f"shift on the base, q_proj, up_proj, {plan.policy_adapter.learned:,} numbers learn"
    runner = Runner(config("run", use="shift", targets=["q_proj", "up_proj"]))
    learning = runner.bank.parameters("policy")
    assert sum(parameter.numel() for parameter in learning.values()) == plan.policy_adapter.learned
    runner.train()
    whole = {name: tensor.clone() for name, tensor in runner.bank.tensors("policy").items()}
    assert all(bool(tensor.any()) for tensor in whole.values())

    steps: Any = Runner(config("half", use="shift", targets=["q_proj", "up_proj"])).steps()
    next(steps)
    steps.close()
    resumed = Runner(config("half", use="shift", targets=["q_proj", "up_proj"]), resume=True)
    resumed.train()
    assert all(torch.equal(tensor, resumed.bank.tensors("policy")[name]) for name, tensor in whole.items())

    final = str(tmp_path / "run" / "final" / "policy")
    reference = {"use": "peft-adapter", "adapter": final}
    continued = Runner(config("more", start="continue", **{"from": final}).with_changes("reference", reference))
    assert all(torch.equal(tensor, continued.bank.tensors("policy")[name]) for name, tensor in whole.items())


def test_a_quantization_it_was_not_tried_on(shift: None, make_config: MakeConfig) -> None:
    config = make_config(policy={"use": "shift"}, quantization="bnb-8bit")
    (found,) = [line for line in Plan.of(config).check() if "shift" in line]
    assert "policy: quantization bnb-8bit: shift isn't among the kinds that were found right on it" in found
    assert not [
        line
        for line in Plan.of(make_config(policy={"use": "shift"}, quantization="bnb-4bit")).check()
        if "shift" in line
    ]


def test_marl_check_names_it(shift: None, make_config: MakeConfig, tmp_path: Path, capsys: Any) -> None:
    from marl_core import dump_config

    file = tmp_path / "run.yaml"
    file.write_text(dump_config(make_config(policy={"use": "shift"})), encoding="utf-8")
    assert load_config(file).policy.label == "shift"
    assert main(["check", str(file)]) == 0
    assert "shift on the base" in capsys.readouterr().out
