"""Options of peft's LoraConfig that make something else of a policy's LoRA are told by name, before anything heavy is read."""

from __future__ import annotations

from typing import Any

import pytest

from marl_core import Catalog, Plan
from marl_core.artifacts.adapter_kinds import VARIANTS
from marl_core.config.load import parse_config


def findings(config: dict[str, Any], catalog: Catalog) -> list[str]:
    return Plan.of(parse_config(config, "f", catalog), catalog).check()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kasa_config": {}}, "policy.lora.kasa_config: such a LoRA rewrites the base's weights when it is made"),
        (
            {"alora_invocation_tokens": [80, 90]},
            "policy.lora.alora_invocation_tokens: such a LoRA is an activated LoRA",
        ),
        ({"monteclora_config": {}}, "draws its weights at random"),
        ({"velora_config": {"num_groups": 4}}, "is a VeLoRA"),
        ({"use_qalora": True}, "works on GPTQ bases only"),
        ({"arrow_config": {}}, "is an Arrow router"),
        ({"megatron_config": {}}, "needs Megatron's layers"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' rewrites the base's weights"),
        ({"init_lora_weights": False}, "policy.lora.init_lora_weights: false starts away from the base"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga' rewrites the base's weights"),
    ],
)
@pytest.mark.parametrize("role", ["policy", "value"])
def test_told_by_name(
    written: dict[str, Any], catalog: Catalog, options: dict[str, Any], sentence: str, role: str
) -> None:
    part = {"lora": options} if role == "policy" else {"on": "own", "lora": options}
    (found,) = findings({**written, role: part}, catalog)
    assert sentence.replace("policy.", f"{role}.") in found


def test_switched_off_they_are_nothing(written: dict[str, Any], catalog: Catalog) -> None:
    off = dict.fromkeys(VARIANTS) | {"use_qalora": False, "target_parameters": None}
    assert findings({**written, "policy": {"lora": off}}, catalog) == []


def test_they_are_options_of_peft() -> None:
    from peft import LoraConfig

    assert set(VARIANTS) <= set(LoraConfig.__dataclass_fields__)
