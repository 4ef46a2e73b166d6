"""The contract of adapters: every kind and form that is built in keeps it, and each way to break it is told by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from peft import LilyConfig, LoraConfig
from pydantic import Field

from marl_core import Adapter, AdapterBank, PluginError, Strategy, hookimpl
from marl_core.testing import check_strategy, fake_rollout
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
    "oft": {"oft_block_size": 8},
    "glora": {"config_C": "none", "config_D_E": "none"},
    "randlora": {"r": 5},
    "road": {"group_size": 8},
    "trainable_tokens": {"token_indices": [int(id) for id in fake_rollout().ids[:, 0]]},
    "vera": {"r": 5},
    "waveft": {"n_frequency": 40},
}


@pytest.fixture
def bank() -> AdapterBank:
    return tiny_bank()


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")
@pytest.mark.parametrize("strategy", FORMS, ids=repr)
def test_every_form_keeps_the_contract(strategy: Strategy, bank: AdapterBank) -> None:
    check_strategy("adapter", strategy, bank)


@pytest.mark.filterwarnings("ignore")  # some kinds' modules warn of compilers that aren't there
@pytest.mark.parametrize("kind", OPTIONS)
def test_every_kind_of_peft_keeps_the_contract(kind: str, bank: AdapterBank) -> None:
    options = dict(SMALL.get(kind, {"r": 4} if "r" in OPTIONS[kind] else {}))
    untied = tiny_bank(tie_word_embeddings=False) if kind == "trainable_tokens" else bank
    check_strategy("adapter", Peft(kind=kind, options=options), untied)


class Broken(Strategy):
    """A LoRA whose promises can be broken one by one."""

    options: dict[str, Any] = Field(default_factory=dict, description="PEFT's.", exclude=True)
    facts: dict[str, Any] = Field(default_factory=dict, description="What it says of itself.", exclude=True)
    make: Callable[[], Any] | None = Field(None, description="Another config.", exclude=True)

    @hookimpl
    def marl_adapter(self, layers: Mapping[str, tuple[int, int]]) -> Any:
        learned = sum(2 * (rows + columns) for rows, columns in layers.values())
        return Adapter(**{"config": self.make or self._config, "learned": learned, **self.facts})

    def _config(self) -> Any:
        return LoraConfig(**{"r": 2, **self.options})


SHARED = LoraConfig(r=2)


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (Broken(facts={"learned": 7}), "it says that 7 numbers learn"),
        (Broken(facts={"rates": {"lora_C": 2.0}}), "which is a part of no learning parameter's name"),
        (Broken(options={"init_lora_weights": False}), "a fresh one is off the base by .* and Adapter.start is 'base'"),
        (
            Broken(options={"init_lora_weights": False}, facts={"start": "rounded"}),
            "which is more than rounding: step-0 KL wouldn't be 0",
        ),
        (Broken(make=lambda: SHARED), "gave the same object twice"),
        (
            Broken(options={"init_lora_weights": "pissa"}),
            "it can't stand on a bank's base: .*rewrites the base's weights",
        ),
        (Broken(make=lambda: LilyConfig(r=2, stride_A=1, num_B=2)), "can't stand|gets other log-probs|numbers learn"),
    ],
)
def test_what_is_broken_is_said(strategy: Strategy, said: str, bank: AdapterBank) -> None:
    with pytest.raises(AssertionError, match=said):
        check_strategy("adapter", strategy, bank)
    assert bank.adapters == []


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        (lambda: 3, "gave a int, expected a peft.PeftConfig"),
        (lambda: 1 / 0, "marl_adapter failed: .*division by zero"),
    ],
)
def test_a_config_that_is_none_is_the_plugins_fault(gives: Callable[[], Any], said: str, bank: AdapterBank) -> None:
    with pytest.raises(PluginError, match=f"Broken: .*{said}|Broken: {said}"):
        check_strategy("adapter", Broken(make=gives), bank)


class Other(Strategy):
    """Gives something else."""

    @hookimpl
    def marl_adapter(self) -> Any:
        return {"learned": 3}


def test_another_result_names_the_plugin(bank: AdapterBank) -> None:
    with pytest.raises(PluginError, match=r"Other: marl_adapter gave a dict, expected a marl_core\.Adapter"):
        check_strategy("adapter", Other(), bank)


class Targets(Oft):
    """An option that hides a key of the section."""

    targets: int = Field(1, description="No layers.")


def test_an_option_with_a_sections_name(bank: AdapterBank) -> None:
    with pytest.raises(AssertionError, match="the option targets has the name of a key of `policy` or `value`"):
        check_strategy("adapter", Targets(block=8), bank)
