"""The contract of adapters: every kind and form that is built in keeps it, and each way to break it is told by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from marl_core import AdapterBank, Strategy
from marl_core.testing import check_strategy
from marl_core.testing.tiny import tiny_bank
from marl_plugins import Dora, Ia3, Lora, Miss, Oft, Peft, Tinylora
from marl_plugins.adapter.peft_options import OPTIONS

FORMS: list[Strategy] = [
    Lora(r=4),
    Lora(r=4, init="gaussian", plus=16.0),
    Lora(r=4, init="orthogonal"),
    Lora(r=4, init="mica"),
    Lora(r=4, rslora=True, ranks={"up_proj": 2}),
    Lora(r=2, lora={"lora_bias": True}),
    Lora(r=2, lora={"layers_to_transform": [1]}),
    Dora(r=4),
    Miss(r=8),
    Miss(r=8, form="bat"),
    Miss(r=8, form="mini", mini=4),
    Oft(block=8),
    Oft(block=8, exact=True),
    Ia3(),
    Ia3(feedforward=[]),
    Tinylora(u=7),
    Tinylora(u=7, tie=1.0),
]
SMALL: Mapping[str, Mapping[str, Any]] = {
    "adalora": {"init_r": 4, "target_r": 4, "total_step": 10},
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 40},
    "glora": {"config_C": "none", "config_D_E": "none"},
    "randlora": {"r": 5},
    "road": {"group_size": 8},
    "trainable_tokens": {"token_indices": [1, 2, 3]},
    "vera": {"r": 5},
    "waveft": {"n_frequency": 40},
}


@pytest.fixture
def bank() -> AdapterBank:
    return tiny_bank()


@pytest.mark.parametrize("strategy", FORMS, ids=repr)
def test_every_form_keeps_the_contract(strategy: Strategy, bank: AdapterBank) -> None:
    check_strategy("adapter", strategy, bank)


@pytest.mark.filterwarnings("ignore")  # some kinds' modules warn of compilers that aren't there
@pytest.mark.parametrize("kind", OPTIONS)
def test_every_kind_of_peft_keeps_the_contract(kind: str, bank: AdapterBank) -> None:
    check_strategy(
        "adapter", Peft(kind=kind, options=dict(SMALL.get(kind, {"r": 4} if "r" in OPTIONS[kind] else {}))), bank
    )
