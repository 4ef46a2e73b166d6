"""A bank after an adapter was taken out, or refused: what comes next finds it as if that one had never been there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from marl_core import AdapterBank, ConfigError, DataError, Runner

MakeConfig = Callable[..., Any]
Write = Callable[..., str]
IDS = torch.tensor([[36, 224, 74, 82], [37, 68, 71, 5]])
MASK = torch.ones_like(IDS)


def plain(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})


@pytest.fixture
def bank(tiny_folder: str) -> AdapterBank:
    return AdapterBank.from_pretrained(tiny_folder, device="cpu")


@torch.no_grad()
def logits(bank: AdapterBank) -> Tensor:
    with bank.bare():
        return bank.trunk.logits_of(bank.trunk.hidden(IDS, MASK.bool()))


class TestTakenOut:
    def test_the_first_of_several(
        self, bank: AdapterBank, reward_adapter: str, sft_adapter: str, tmp_path: Path
    ) -> None:
        """PEFT keeps the name of the first adapter as the active one, also when it is gone."""
        wanted = bank.compute_reward_score if bank.load_reward(reward_adapter) else None
        assert wanted is not None
        score = wanted(IDS, MASK)
        bank.load("sft", sft_adapter)
        bank.remove("reward")
        bank.add("policy", plain())
        bank.save("sft", tmp_path / "sft")
        assert load_file(tmp_path / "sft" / "adapter_model.safetensors").keys() == bank.tensors("sft").keys()
        bank.remove("sft")
        bank.load_reward(reward_adapter)
        assert torch.equal(bank.compute_reward_score(IDS, MASK), score)

    def test_a_policy_and_then_a_run_under_its_name(self, make_config: MakeConfig) -> None:
        first = Runner(make_config())
        Runner(make_config(), bank=first.bank, policy="second")
        first.bank.remove("policy")
        assert set(first.bank.heads) == {"second-value-head"}
        again = Runner(make_config(), bank=first.bank)
        alone = Runner(make_config())
        for one, other in zip(again.steps(), alone.steps(), strict=True):
            assert one.metrics["policy/loss"] == other.metrics["policy/loss"]

    def test_a_head_alone(self, bank: AdapterBank) -> None:
        bank.add_value_head("v")
        bank.remove("v")
        assert not bank.heads

    @pytest.mark.parametrize("call", ["remove", "tensors", "activate", "save"])
    def test_what_is_not_there(self, bank: AdapterBank, call: str, tmp_path: Path) -> None:
        bank.add("policy", plain())
        more = (tmp_path,) if call == "save" else ()
        with pytest.raises(ConfigError, match="no adapter 'nope'; it has: policy"):
            getattr(bank, call)("nope", *more)


class TestRefused:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (plain(modules_to_save=["lm_head"]), "modules_to_save"),
            (plain(bias="all"), "biases of the base"),
            (plain(bias="lora_only"), "biases of the base"),
            (plain(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True), "output layer|tied"),
            (plain(alora_invocation_tokens=[80]), "activated LoRA"),
            ({"r": 4}, "not a dict"),
        ],
    )
    @pytest.mark.parametrize("beside", [False, True])
    def test_the_next_one_finds_the_base_as_it_was(
        self, bank: AdapterBank, config: Any, message: str, beside: bool
    ) -> None:
        wanted = logits(bank)
        if beside:
            bank.add("beside", plain())
        before = {name: type(module) for name, module in bank.base.named_modules()}
        with pytest.raises(ConfigError, match=message):
            bank.add("it", config)
        assert {name: type(module) for name, module in bank.base.named_modules()} == before
        bank.add("next", plain())
        assert torch.equal(logits(bank), wanted)


class TestFiles:
    def test_a_layer_that_should_have_been_saved_whole(
        self, tiny_folder: str, bank: AdapterBank, write_sft_adapter: Write, tmp_path: Path
    ) -> None:
        """Plain peft stops with a KeyError; without that layer the numbers would be others."""
        edit_config(write_sft_adapter(tiny_folder, tmp_path / "sft"), modules_to_save=["lm_head"])
        with pytest.raises(DataError, match="lm_head was trained whole"):
            bank.load("sft", tmp_path / "sft")
        edit_config(str(tmp_path / "sft"), modules_to_save=["classifier", "score", "wte"])  # layers this model lacks
        bank.load("sft", tmp_path / "sft")

    def test_8_bit_floats(self, bank: AdapterBank, sft_adapter: str, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_bytes((Path(sft_adapter) / "adapter_config.json").read_bytes())
        small = {
            name: t.to(torch.float8_e4m3fn) for name, t in load_file(f"{sft_adapter}/adapter_model.safetensors").items()
        }
        save_file(small, tmp_path / "adapter_model.safetensors")
        bank.load("sft", tmp_path)
        assert all(torch.equal(tensor, small[name].float()) for name, tensor in bank.tensors("sft").items())

    def test_no_other_base_is_blamed_for_a_wrong_value(
        self, tiny_folder: str, bank: AdapterBank, write_sft_adapter: Write, tmp_path: Path
    ) -> None:
        for changes in ({"r": "4"}, {"lora_alpha": None}, {"rank_pattern": ["q_proj"]}, {"target_modules": "q_proj"}):
            edit_config(write_sft_adapter(tiny_folder, tmp_path / "sft"), **changes)
            with pytest.raises(DataError) as caught:
                bank.load("sft", tmp_path / "sft")
            assert "another base" not in str(caught.value)
            assert ("target_modules" in changes) == ("Name those among them" in str(caught.value))


def edit_config(folder: str, **changes: Any) -> None:
    import json

    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
