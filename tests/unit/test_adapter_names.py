"""Whatever a second adapter is called, it takes nothing out of the first one's files, and adds nothing to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from marl_core import AdapterBank
from marl_core.bank.integrity import frozen_weights, learning_weights
from marl_core.testing.kinds import make_config

IDS = torch.tensor([[36, 224, 74, 82], [37, 68, 71, 5]])
OF_MODULES = (
    "mlp",
    "self_attn",
    "up_proj",
    "q_proj",
    "layers",
    "0",
    "1",
    "model",
    "base_model",
    "weight",
    "bias",
    "lm_head",
)
OF_PEFT = ("default", "lora_A", "lora_B", "lora_magnitude_vector", "A", "base_layer", "active_adapter")
OF_EACH_OTHER = ("policy_2", "policy-value", "polic", "olicy", "POLICY")
pytestmark = pytest.mark.filterwarnings("ignore:.lora_bias=True.", "ignore:.*have invalid shape")
OPTIONS: tuple[dict[str, object], ...] = ({}, {"use_dora": True}, {"lora_bias": True})


def add(bank: AdapterBank, name: str, seed: int, **options: object) -> None:
    """An adapter whose weights are all random."""
    bank.add(name, make_config(4, 8, "all-linear", 0.0, options, bank.linears), seed=seed)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bank.parameters(name).values():
            parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.1)


@torch.no_grad()
def plain(base: str, folder: Path) -> Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
    found: Tensor = model(IDS).logits
    return found


@torch.no_grad()
def seen(bank: AdapterBank, name: str) -> Tensor:
    with bank.using(name) as model:
        found: Tensor = model(IDS).logits
        return found


@pytest.mark.parametrize("name", [*OF_MODULES, *OF_PEFT, *OF_EACH_OTHER])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_files_of_both_are_whole(tiny_folder: str, tmp_path: Path, name: str, options: dict[str, object]) -> None:
    bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
    add(bank, "policy", 1, **options)
    bank.save("policy", tmp_path / "alone")
    alone = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    by_peft = PeftModel(AutoModelForCausalLM.from_pretrained(tiny_folder), bank.config("policy"))
    assert set(alone) == set(get_peft_model_state_dict(by_peft))
    add(bank, name, 2, **options)
    for adapter in ("policy", name):
        bank.save(adapter, tmp_path / adapter)
        assert set(load_file(tmp_path / adapter / "adapter_model.safetensors")) == set(alone)
        assert torch.equal(plain(tiny_folder, tmp_path / adapter), seen(bank, adapter))
    beside = load_file(tmp_path / "policy" / "adapter_model.safetensors")
    assert all(torch.equal(beside[key], tensor) for key, tensor in alone.items())
    bank.load("again", tmp_path / "policy")
    assert torch.equal(seen(bank, "again"), seen(bank, "policy"))


@pytest.mark.parametrize("name", ["mlp", "weight", "0", "lora_A", "policy_2"])
def test_parameters_of_one_are_none_of_the_others(tiny_folder: str, name: str) -> None:
    bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
    add(bank, "policy", 1)
    add(bank, name, 2)
    mine, theirs = (set(map(id, bank.parameters(adapter).values())) for adapter in ("policy", name))
    base = [p for key, p in bank.all_parameters().items() if id(p) not in mine | theirs]
    assert len(mine) == len(theirs) == 28
    assert not mine & theirs
    assert not any(p.requires_grad for p in base)
    assert len(base) == len(list(AutoModelForCausalLM.from_pretrained(tiny_folder).parameters()))
    assert len(learning_weights(bank)._tensors) == 56
    assert len(frozen_weights(bank)._tensors) == len(base)
    before = seen(bank, "policy")
    bank.remove(name)
    assert torch.equal(seen(bank, "policy"), before)
    assert set(map(id, bank.parameters("policy").values())) == mine


@pytest.mark.parametrize(
    "name", ["keys", "items", "train", "training", "forward", "type", "half", "lora_", "a", "__base__"]
)
def test_names_that_torch_and_peft_have_uses_for(tiny_folder: str, tmp_path: Path, name: str) -> None:
    """An adapter's name stands in no module of torch's or PEFT's."""
    bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
    add(bank, name, 1)
    bank.save(name, tmp_path / "saved")
    assert torch.equal(plain(tiny_folder, tmp_path / "saved"), seen(bank, name))


def test_tensors_are_the_models_own(tiny_folder: str) -> None:
    """A strategy moves its adapter by writing into them."""
    bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
    add(bank, "policy", 1)
    for tensor in bank.tensors("policy").values():
        assert not tensor.requires_grad
        tensor.zero_()
    assert all(not bool(p.any()) for p in bank.parameters("policy").values())
