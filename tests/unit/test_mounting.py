"""Adapters of several kinds on one base, each bitwise what it is alone in PEFT: logits, gradients, files, and the base when all are off."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, OFTConfig, PeftModel
from torch import Tensor

from marl_core import AdapterBank, ConfigError
from marl_core.testing import tiny_model, tiny_tokenizer
from marl_core.testing.kinds import SMALL_KINDS, small_config

IDS = torch.tensor([[36, 224, 74, 82], [37, 68, 71, 5]])
KINDS = [name for name in SMALL_KINDS if name != "trainable_tokens"]  # their tied embedding is the output layer
KINDS_OF_THE_BASES_DTYPE = ("ln_tuning", torch.bfloat16)
"""PEFT keeps it in half precision, in which small steps round away."""
PAIRS = [
    ("hra", "lora"),
    ("miss bat", "lora"),
    ("lora", "hra"),
    ("vera", "lora"),
    ("tinylora", "oft"),
    ("shira", "dora"),
    ("mica", "road"),
]
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:RuntimeWarning:peft")


def model(dtype: torch.dtype) -> Any:
    made: Any = tiny_model()
    return made.to(dtype)


def noise(parameters: Any, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_((torch.randn(parameter.shape, generator=random) * 0.05).to(parameter.dtype))


def bank_with(kinds: tuple[str, ...], dtype: torch.dtype = torch.float32, folder: Path | None = None) -> AdapterBank:
    bank = AdapterBank(model(dtype), tiny_tokenizer())
    for seed, kind in enumerate(kinds):
        bank.add(kind.replace(" ", "-"), small_config(kind), seed=seed)
        noise(bank.parameters(kind.replace(" ", "-")).values(), seed)
    return bank


def alone(kind: str, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """The same adapter in a PeftModel of its own, on a base of its own."""
    base = model(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        plain: Any = PeftModel(base, small_config(kind))
    noise(learning(plain), seed)
    return plain.eval()


def learning(plain: Any) -> list[Any]:
    """What learns in it, each once, in the tree's order; PEFT leaves AdaLoRA's count of ranks learning in half precision, marl doesn't."""
    named = plain.get_base_model().named_parameters()
    return list({id(p): p for name, p in named if p.requires_grad and "ranknum" not in name}.values())


def loss(logits: Tensor) -> Tensor:
    return (logits.float() * torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))).mean()


@torch.no_grad()
def logits(bank: AdapterBank, adapter: str | None) -> Tensor:
    with bank.using(adapter) as base:
        found: Tensor = base(IDS).logits
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_beside_others_is_what_it_is_alone(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The policy of this kind, a LoRA and a DoRA beside it: logits, gradients and file as plain peft's."""
    if (kind, dtype) == KINDS_OF_THE_BASES_DTYPE:
        with pytest.raises(ConfigError, match=r"use model\.dtype: float32"):
            bank_with((kind,), dtype)
        return
    name = kind.replace(" ", "-")
    bank = bank_with((kind, *(other for other in ("lora", "dora") if other != kind)), dtype)
    plain = alone(kind, 0, dtype)
    with torch.no_grad():
        assert torch.equal(logits(bank, name), plain(IDS).logits)
        assert torch.equal(logits(bank, None), model(dtype)(IDS).logits)
    loss(plain(IDS).logits).backward()
    with bank.using(name) as base:
        loss(base(IDS).logits).backward()
    mine = [parameter.grad for parameter in bank.parameters(name).values()]
    theirs = [parameter.grad for parameter in learning(plain)]
    assert len(mine) == len(theirs) > 0
    assert all(
        one is not None and other is not None and torch.equal(one, other)
        for one, other in zip(mine, theirs, strict=True)
    )
    bank.save(name, tmp_path / "saved")
    again = PeftModel.from_pretrained(model(dtype), str(tmp_path / "saved")).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, logits(bank, name))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_two_kinds_at_once_learn_as_each_alone(pair: tuple[str, str]) -> None:
    """Two losses through two kinds, one after the other on one base, against two models of their own."""
    bank = bank_with(pair)
    names = [kind.replace(" ", "-") for kind in pair]
    for name in (*names, *reversed(names)):
        with bank.using(name) as base:
            loss(base(IDS).logits).backward()
    for seed, (kind, name) in enumerate(zip(pair, names, strict=True)):
        plain = alone(kind, seed)
        for _ in range(2):
            loss(plain(IDS).logits).backward()
        theirs = [parameter.grad for parameter in learning(plain)]
        mine = [parameter.grad for parameter in bank.parameters(name).values()]
        assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_and_goes_and_comes_again(kind: str, tmp_path: Path) -> None:
    """Loaded from its file under another name, removed, and the base is bit for bit what it was, hooks and all."""
    name = kind.replace(" ", "-")
    bank = bank_with((kind,))
    wanted, bits = logits(bank, name), {key: tensor.clone() for key, tensor in bank.base.state_dict().items()}
    tree = {key: type(module) for key, module in bank.base.named_modules()}
    bank.save(name, tmp_path / "saved")
    bank.copy(name, "copied")
    assert torch.equal(logits(bank, "copied"), wanted)
    assert not any(parameter.requires_grad for parameter in bank.parameters("copied").values())
    bank.remove(name)
    bank.remove("copied")
    assert (
        {key: type(module) for key, module in bank.base.named_modules()}
        == tree
        == {key: type(module) for key, module in tiny_model().named_modules()}
    )
    assert all(torch.equal(tensor, bits[key]) for key, tensor in bank.base.state_dict().items())
    assert bank.all_parameters().keys() == dict(tiny_model().named_parameters()).keys()
    assert not hasattr(bank.base, "peft_config")


@pytest.mark.parametrize("kind", ["lora", "tinylora", "vera", "shira"])
def test_a_copy_is_nobody_elses(kind: str) -> None:
    """Kinds that share projections between layers share none between adapters."""
    bank = bank_with((kind,))
    bank.copy(kind, "copied")
    before = logits(bank, "copied")
    assert torch.equal(before, logits(bank, kind))
    noise(bank.parameters(kind).values(), 5)
    assert torch.equal(logits(bank, "copied"), before)
    assert not torch.equal(logits(bank, kind), before)
    bank.fill("copied", bank.tensors(kind))
    assert torch.equal(logits(bank, "copied"), logits(bank, kind))


def test_what_is_removed_while_it_stands_is_gone() -> None:
    bank = bank_with(("lora", "oft"))
    bank.activate("lora")
    bank.remove("lora")
    assert bank.active is None
    with torch.no_grad():
        assert torch.equal(bank.base(IDS).logits, tiny_model()(IDS).logits)
    bank.activate("oft")
    bank.remove("oft")
    assert {key: type(module) for key, module in bank.base.named_modules()} == {
        key: type(module) for key, module in tiny_model().named_modules()
    }


def test_what_peft_keeps_fixed_does_not_learn() -> None:
    """MiCA trains one of its two factors: 14 of 28 tensors of the tiny model's seven layers times two."""
    bank = AdapterBank(tiny_model(), tiny_tokenizer())
    bank.add("policy", LoraConfig(r=4, target_modules="all-linear", init_lora_weights="mica"), seed=0)
    assert len(bank.parameters("policy")) == 14
    assert len(bank.adapter_parameters("policy")) == 28
    assert {name for name, p in bank.all_parameters().items() if p.requires_grad} == set(bank.parameters("policy"))


def test_checkpointing_leaves_no_hook() -> None:
    """PEFT puts one on the embeddings for each adapter that is added while checkpointing is on."""
    bank = AdapterBank(tiny_model(), tiny_tokenizer())
    base: Any = bank.base
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    embedding: Any = base.get_input_embeddings()
    before = dict(embedding._forward_hooks)
    for name in ("one", "two"):
        bank.add(name, small_config("lora"), seed=0)
    assert embedding._forward_hooks == before


def test_the_config_given_stays_the_callers() -> None:
    bank = AdapterBank(tiny_model(), tiny_tokenizer())
    given = small_config("lora")
    before = copy.deepcopy(given)
    bank.add("policy", given, seed=0)
    assert vars(given) == vars(before)
    bank.config("policy").r = 99
    assert bank.config("policy").r == 4


def test_an_adapter_on_the_output_layer_is_refused() -> None:
    bank = AdapterBank(tiny_model(), tiny_tokenizer())
    for config in (
        LoraConfig(target_modules=["lm_head"]),
        OFTConfig(oft_block_size=8, target_modules=["q_proj", "lm_head"]),
    ):
        with pytest.raises(ConfigError, match=r"the output layer, whose own weight|is the output layer"):
            bank.add("policy", config, seed=0)
        assert bank.adapters == []


def test_someone_who_switches_layers_behind_the_bank_is_seen() -> None:
    bank = bank_with(("lora", "hra"))
    before, wanted = bank.seen, logits(bank, "lora")
    layers: Any = bank.wrappers("lora")
    next(iter(layers.values())).enable_adapters(False)
    assert bank.seen != before
    assert not torch.equal(logits(bank, "lora"), wanted)
    bank.see_again(None)
    assert bank.seen == before
    assert torch.equal(logits(bank, "lora"), wanted)
    assert all(parameter.requires_grad for parameter in bank.parameters("lora").values())
