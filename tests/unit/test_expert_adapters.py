"""LoRA on experts that transformers 5 keeps as one tensor: new ones, peft's files, and files of transformers 4."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from marl_core import AdapterBank, ConfigError, DataError, Plan, Runner
from marl_core.artifacts.architecture import CONVERTED_EXPERTS
from marl_core.bank.integrity import frozen_weights
from marl_core.testing import tiny_tokenizer
from marl_core.testing.kinds import make_config as lora_config

MakeConfig = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:RuntimeWarning:peft")
IDS = torch.tensor([[36, 224, 74, 82], [37, 68, 71, 5]])
EVERY = torch.ones_like(IDS, dtype=torch.bool)
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERTS, HIDDEN, INNER, RANK, ALPHA = 4, 32, 16, 4, 8
HEAD_DIM: dict[str, Any] = {"head_dim": 8}
SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[Any, tuple[str, str, str], str]] = {
    "qwen3_moe": (
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SIZES, moe_intermediate_size=INNER, intermediate_size=64, num_experts=EXPERTS, **HEAD_DIM)
        ),
        ("gate_proj", "up_proj", "down_proj"),
        "mlp.experts",
    ),
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=INNER, num_local_experts=EXPERTS)),
        ("w1", "w3", "w2"),
        "block_sparse_moe.experts",
    ),
    "olmoe": (
        lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, intermediate_size=INNER, num_experts=EXPERTS)),
        ("gate_proj", "up_proj", "down_proj"),
        "mlp.experts",
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model of each family."""
    made = {}
    for name, (build, _, _) in FAMILIES.items():
        folder = tmp_path_factory.mktemp("experts") / name
        torch.manual_seed(0)
        build().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        made[name] = str(folder)
    return made


@torch.no_grad()
def logits(bank: AdapterBank, adapter: str | None) -> Tensor:
    with bank.using(adapter):
        return bank.trunk.logits_of(bank.trunk.hidden(IDS, EVERY))


def written_by_4(folder: Path, family: str, base: str, only: tuple[str, ...] | None = None) -> tuple[Path, Tensor]:
    """An adapter as transformers 4 and peft wrote it, expert by expert; and the logits of the base with it, by hand."""
    _, (gate, up, down), where = FAMILIES[family]
    model, noise = AutoModelForCausalLM.from_pretrained(base), torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for layer in range(2):
            experts: Any = model.model.layers[layer].mlp.experts
            for expert in range(EXPERTS):
                for name, (out, inside) in {gate: (INNER, HIDDEN), up: (INNER, HIDDEN), down: (HIDDEN, INNER)}.items():
                    if only is not None and name not in only:
                        continue
                    a, b = (torch.randn(*shape, generator=noise) * 0.3 for shape in ((RANK, inside), (out, RANK)))
                    key = f"base_model.model.model.layers.{layer}.{where}.{expert}.{name}"
                    tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
                    weight = experts.down_proj if name == down else experts.gate_up_proj
                    rows = slice(INNER, 2 * INNER) if name == up else slice(0, INNER if name == gate else HIDDEN)
                    weight[expert, rows] += b @ a * (ALPHA / RANK)
            attention: Any = model.model.layers[layer].self_attn.q_proj
            a, b = torch.randn(RANK, HIDDEN, generator=noise) * 0.3, torch.randn(HIDDEN, RANK, generator=noise) * 0.3
            key = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            attention.weight += b @ a * (ALPHA / RANK)
        found = model(IDS).logits
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", *(only or (gate, up, down))]
    )
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder, found


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_transformers_4(folders: dict[str, str], make_config: MakeConfig, tmp_path: Path, family: str) -> None:
    base = folders[family]
    folder, wanted = written_by_4(tmp_path / "it", family, base)
    bank = AdapterBank.from_pretrained(base, device="cpu")
    bare = logits(bank, None)
    bank.load("it", folder)
    torch.testing.assert_close(logits(bank, "it"), wanted, rtol=0, atol=1e-4)
    assert torch.equal(logits(bank, None), bare)
    reference = {"use": "peft-adapter", "adapter": str(folder), "allow_mismatch": True}
    assert Plan.of(make_config(model={"path": base}, policy={"targets": ["q_proj"]}, reference=reference)).check() == []


@pytest.mark.parametrize(
    ("only", "why"),
    [
        (("gate_proj",), "only one of gate_proj and up_proj"),
        (("up_proj", "down_proj"), "only one of gate_proj and up_proj"),
    ],
)
def test_half_of_a_fused_weight(
    folders: dict[str, str], make_config: MakeConfig, tmp_path: Path, only: tuple[str, ...], why: str
) -> None:
    base = folders["qwen3_moe"]
    folder, _ = written_by_4(tmp_path / "it", "qwen3_moe", base, only)
    bank = AdapterBank.from_pretrained(base, device="cpu")
    with pytest.raises(DataError, match="Merge it with transformers 4"):
        bank.load("it", folder)
    assert bank.adapters == []
    reference = {"use": "peft-adapter", "adapter": str(folder), "allow_mismatch": True}
    found = Plan.of(make_config(model={"path": base}, policy={"targets": ["q_proj"]}, reference=reference)).check()
    assert any(why in finding and "transformers 4" in finding for finding in found)


def test_layers_of_the_same_name_outside_the_experts(
    folders: dict[str, str], make_config: MakeConfig, tmp_path: Path
) -> None:
    """A shared expert, or a dense layer before the mixtures: peft's conversion leaves their LoRA out."""
    from safetensors.torch import load_file

    base = folders["qwen3_moe"]
    folder, _ = written_by_4(tmp_path / "it", "qwen3_moe", base)
    file = folder / "adapter_model.safetensors"
    more = {
        f"base_model.model.model.layers.0.mlp.shared_expert.up_proj.lora_{k}.weight": torch.ones(4, 32) for k in "AB"
    }
    save_file({**load_file(file), **more}, file)
    reference = {"use": "peft-adapter", "adapter": str(folder), "allow_mismatch": True}
    found = Plan.of(make_config(model={"path": base}, policy={"targets": ["q_proj"]}, reference=reference)).check()
    assert any("layers of the same name outside the experts are adapted too" in finding for finding in found)
    with pytest.raises(DataError, match="outside the experts are adapted too"):
        AdapterBank.from_pretrained(base, device="cpu").load("it", folder)


def test_model_types_that_peft_converts() -> None:
    from peft.utils import transformers_weight_conversion

    peft_knows: Any = transformers_weight_conversion

    patterns = peft_knows._MODEL_TO_CONVERSION_PATTERN
    known = {
        kind for kind, pattern in patterns.items() if pattern in peft_knows._MOE_FUSED_TARGETS and kind[0].islower()
    }
    assert known - {"beam"} <= CONVERTED_EXPERTS
    assert (
        known | set(peft_knows._MOE_FUSED_TARGETS) | {"qwen3_omni_moe_text"} >= CONVERTED_EXPERTS
    )  # which transformers 5.17 lacks


class TestNewOnes:
    """`target_parameters`: experts are trained directly, the base stays."""

    def bank(self, base: str, *names: str) -> AdapterBank:
        bank = AdapterBank.from_pretrained(base, device="cpu")
        for seed, name in enumerate(names):
            extra = {"target_parameters": PARAMETERS}
            bank.add(name, lora_config(RANK, ALPHA, ["q_proj"], 0.0, extra, bank.linears), seed=seed)
        return bank

    def test_starts_as_the_base_and_leaves_it_alone(self, folders: dict[str, str]) -> None:
        bank = AdapterBank.from_pretrained(folders["qwen3_moe"], device="cpu")
        bare = logits(bank, None)
        bank = self.bank(folders["qwen3_moe"], "policy", "second")
        assert torch.equal(logits(bank, "policy"), bare)
        guard = frozen_weights(bank)
        before, versions = guard.checksum(), guard.versions()
        for name in ("policy", "second"):
            with bank.using(name):
                bank.trunk.hidden(IDS, EVERY).square().mean().backward()
        assert guard.changed(versions) == []
        assert guard.checksum() == before
        assert torch.equal(logits(bank, None), bare)

    def test_gradient_and_file_are_plain_pefts(self, folders: dict[str, str], tmp_path: Path) -> None:
        base = folders["qwen3_moe"]
        bank = self.bank(base, "policy", "second")
        noise = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in bank.parameters("policy").values():
                parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.1)
        bank.save("policy", tmp_path / "policy")
        judge = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "policy"), is_trainable=True
        ).eval()
        wanted = judge(IDS).logits
        torch.testing.assert_close(logits(bank, "policy"), wanted.detach(), rtol=0, atol=1e-4)
        wanted.square().mean().backward()
        with bank.using("policy"):
            bank.trunk.logits_of(bank.trunk.hidden(IDS, EVERY)).square().mean().backward()
        theirs = {name.replace(".default", ""): p.grad for name, p in judge.named_parameters() if p.requires_grad}
        mine = {f"base_model.model.{n.replace('.policy', '')}": p.grad for n, p in bank.parameters("policy").items()}
        assert mine.keys() == theirs.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-5)

    def test_a_run(self, folders: dict[str, str], make_config: MakeConfig) -> None:
        policy = {"targets": ["q_proj"], "lora": {"target_parameters": PARAMETERS}}
        config = make_config(model={"path": folders["qwen3_moe"]}, policy=policy)
        assert Plan.of(config).check() == []
        runner = Runner(config)
        before = frozen_weights(runner.bank).checksum()
        moved = {name: p.detach().clone() for name, p in runner.bank.parameters("policy").items()}
        assert [stats.step for stats in runner.steps()] == [1, 2]
        assert frozen_weights(runner.bank).checksum() == before
        assert all(
            not torch.equal(p, moved[name]) for name, p in runner.bank.parameters("policy").items() if "experts" in name
        )

    def test_names_of_no_weight(self, folders: dict[str, str]) -> None:
        bank = AdapterBank.from_pretrained(folders["qwen3_moe"], device="cpu")
        config = lora_config(4, 8, ["q_proj"], 0.0, {"target_parameters": ["mlp.experts.w1"]}, bank.linears)
        with pytest.raises(ConfigError, match=r"target_parameters mlp\.experts\.w1 name no weight of this base"):
            bank.add("policy", config)
        assert bank.adapters == []
        assert logits(bank, None).isfinite().all()

    def test_what_peft_can_not_do_is_said_before(
        self, folders: dict[str, str], make_config: MakeConfig, tmp_path: Path
    ) -> None:
        base = folders["qwen3_moe"]
        bank = self.bank(base, "policy")
        bank.save("policy", tmp_path / "it")
        saved = json.loads((tmp_path / "it" / "adapter_config.json").read_text(encoding="utf-8"))
        assert set(saved["target_parameters"]) == set(PARAMETERS)
        other = {"targets": ["q_proj"], "lora": {"target_parameters": PARAMETERS[:1]}}
        reference = {"use": "peft-adapter", "adapter": str(tmp_path / "it"), "allow_mismatch": True}
        assert Plan.of(make_config(model={"path": base}, policy=other, reference=reference)).check() == []
        (found,) = Plan.of(make_config(model={"path": base}, policy={**other, "dropout": 0.1})).check()
        assert "policy.dropout: 0.1, but peft has no dropout for target_parameters" in found
        (found,) = Plan.of(make_config(model={"path": base, "shard": "fsdp2"}, policy=other)).check()
        assert "policy.lora.target_parameters with model.shard" in found


def test_adapters_of_one_base_may_adapt_different_weights(folders: dict[str, str]) -> None:
    """PEFT's one model for all lets them adapt the same ones only."""
    bank = AdapterBank.from_pretrained(folders["qwen3_moe"], device="cpu")
    names = {"down": PARAMETERS[1:], "both": PARAMETERS}
    for seed, (name, parameters) in enumerate(names.items()):
        bank.add(name, LoraConfig(r=RANK, target_modules=["q_proj"], target_parameters=parameters), seed=seed)
        with torch.no_grad():
            for parameter in bank.parameters(name).values():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
    found = {name: logits(bank, name) for name in names}
    for name, parameters in names.items():
        alone = AdapterBank.from_pretrained(folders["qwen3_moe"], device="cpu")
        alone.add("alone", LoraConfig(r=RANK, target_modules=["q_proj"], target_parameters=parameters), seed=9)
        alone.fill("alone", bank.tensors(name))
        assert torch.equal(logits(alone, "alone"), found[name])
    assert not torch.equal(found["down"], found["both"])
