"""Model folders whose weights are quantized already: held as what they are, with their library's guards, or refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from marl_core import AdapterBank, Catalog, ConfigError, Plan, Runner
from marl_core.artifacts.model_files import ModelFiles
from marl_core.plan.memory import estimate
from marl_core.plan.stored_weights import stored_quantization, stored_quantization_config
from marl_core.testing.kinds import make_config as lora_config
from marl_plugins.quantization import keep_unpacked

MakeConfig = Callable[..., Any]
IDS = torch.tensor([[36, 224, 74, 82], [37, 68, 71, 5]])
EVERY = torch.ones_like(IDS, dtype=torch.bool)
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "nf4": (NF4, "bnb-4bit"),
    "fp4, its constants quantized too": (
        {**NF4, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
        "bnb-4bit",
    ),
    "int8": ({"load_in_8bit": True, "llm_int8_threshold": 0.0}, "bnb-8bit"),
}


@pytest.fixture(scope="module")
def packed(wide_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The wide tiny model as bitsandbytes' users upload it, in each way."""
    made = {}
    for number, (what, (options, _)) in enumerate(KINDS.items()):
        folder = tmp_path_factory.mktemp("packed") / str(number)
        model = AutoModelForCausalLM.from_pretrained(wide_folder, quantization_config=BitsAndBytesConfig(**options))
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(wide_folder).save_pretrained(folder)
        made[what] = str(folder)
    return made


@pytest.mark.parametrize("what", KINDS)
def test_held_as_it_is(packed: dict[str, str], make_config: MakeConfig, tmp_path: Path, what: str) -> None:
    """Log-probs are those of transformers, `marl check` says what the base is, and an adapter of this very base fits."""
    folder, strategy = packed[what], KINDS[what][1]
    plan = Plan.of(make_config(model={"path": folder, "dtype": "float32"}))
    assert plan.check() == []
    assert strategy in plan.describe()[0].weights
    assert plan.config.quantization.label == strategy
    bank = AdapterBank.from_pretrained(folder, device="cpu")
    assert bank.quantization.config is not None
    judge = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32).eval()
    keep_unpacked(judge)  # else its first pass packs the weights anew, in bfloat16, where the CPU has such kernels
    with torch.no_grad():
        found = bank.trunk.logits_of(bank.trunk.hidden(IDS, EVERY))
        torch.testing.assert_close(found, judge(IDS).logits, rtol=0, atol=1e-3)
    if strategy == "bnb-4bit":
        assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in bank.base.modules())
    get_peft_model(judge, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
        str(tmp_path / "it")
    )
    adapter = {"use": "peft-adapter", "adapter": str(tmp_path / "it"), "allow_mismatch": True}
    assert Plan.of(make_config(model={"path": folder}, reference=adapter)).check() == []


@pytest.mark.parametrize("what", ["nf4", "fp4, its constants quantized too"])
def test_shapes_are_those_that_the_packed_weights_stand_for(
    wide_folder: str, packed: dict[str, str], what: str
) -> None:
    mine, plain = (ModelFiles(Path(folder), {}).shapes() for folder in (packed[what], wide_folder))
    assert mine == plain


def test_the_gradient_after_a_rollout(packed: dict[str, str]) -> None:
    """A CPU that repacks 4-bit weights in the first pass without gradient gives wrong ones ever after."""
    bank = AdapterBank.from_pretrained(packed["nf4"], device="cpu")
    bank.add("policy", lora_config(4, 8, "all-linear", 0.0, {}, bank.linears), seed=0)

    def gradient() -> torch.Tensor:
        with bank.using("policy"):
            bank.trunk.hidden(IDS, EVERY).square().mean().backward()
        grads = [p.grad.flatten().clone() for p in bank.parameters("policy").values() if p.grad is not None]
        for parameter in bank.parameters("policy").values():
            parameter.grad = None
        return torch.cat(grads)

    before = gradient()
    with torch.no_grad(), bank.using("policy"):
        bank.trunk.hidden(IDS, EVERY)
    assert torch.equal(gradient(), before)


def test_a_run(packed: dict[str, str], make_config: MakeConfig) -> None:
    runner = Runner(make_config(model={"path": packed["nf4"]}, ppo={"steps": 1}))
    assert [stats.step for stats in runner.steps()] == [1]
    second = Runner(make_config(model={"path": packed["nf4"]}, ppo={"steps": 1}), bank=runner.bank, policy="second")
    assert second.bank is runner.bank  # the same base, asked for in the same words


def test_the_estimate_counts_weights_not_bytes(
    wide_folder: str, packed: dict[str, str], make_config: MakeConfig
) -> None:
    of_folder = estimate(Plan.of(make_config(model={"path": packed["nf4"]})))
    asked = estimate(Plan.of(make_config(model={"path": wide_folder}, quantization="bnb-4bit")))
    for mine, theirs in zip(of_folder.roles[:2], asked.roles[:2], strict=True):
        assert mine.shared == pytest.approx(theirs.shared)


@pytest.mark.parametrize(
    ("what", "changes", "sentence"),
    [
        (
            "nf4",
            {"quantization": "bnb-8bit"},
            "quantization: bnb-8bit, but .* quantized already .bitsandbytes, 4 bits.. Leave",
        ),
        (
            "int8",
            {"quantization": "bnb-4bit"},
            "quantization: bnb-4bit, but .* quantized already .bitsandbytes, 8 bits",
        ),
        (
            "int8",
            {"model": {"gradient_checkpointing": True}},
            "model.gradient_checkpointing with quantization bnb-8bit",
        ),
        ("nf4", {"model": {"shard": "fsdp2"}}, "model.shard: .* packed weights can't be sharded"),
    ],
)
def test_what_does_not_go_with_it(
    packed: dict[str, str], make_config: MakeConfig, what: str, changes: dict[str, Any], sentence: str
) -> None:
    model = {"path": packed[what], **changes.get("model", {})}
    found = Plan.of(make_config(**{**changes, "model": model})).check()
    assert any(re.search(sentence, said) for said in found), found


def test_nothing_is_merged_into_packed_weights(packed: dict[str, str], make_config: MakeConfig, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed["nf4"], device_map="cpu")
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
        str(tmp_path / "it")
    )
    reference = {"use": "merged-base", "adapter": str(tmp_path / "it")}
    (found,) = Plan.of(make_config(model={"path": packed["nf4"]}, reference=reference)).check()
    assert "merging into them would round. Merge into the unquantized model first (marl_core.merge_adapter)" in found


OTHERS: dict[str, dict[str, Any]] = {
    "gptq, 4 bits": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq, 4 bits": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "hqq": {"quant_method": "hqq"},
}


@pytest.mark.parametrize("told", OTHERS)
@pytest.mark.parametrize("inside", [False, True])
def test_others_are_refused_before_weights_are_read(
    tiny_folder: str, make_config: MakeConfig, tmp_path: Path, told: str, inside: bool
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    said = {"quantization_config": OTHERS[told]}
    file.write_text(json.dumps({**config, **({"text_config": said} if inside else said)}), encoding="utf-8")
    (found,) = Plan.of(make_config(model={"path": str(tmp_path / "base")})).check()
    assert f"quantized already ({told}), and no quantization of marl's holds such weights" in found
    assert "Give the unquantized model" in found
    with pytest.raises(ConfigError, match="quantized already"):
        AdapterBank.from_pretrained(str(tmp_path / "base"), device="cpu")


def test_plain_folders_say_nothing() -> None:
    nothing: list[dict[str, Any]] = [{}, {"quantization_config": None}, {"text_config": {"hidden_size": 8}}]
    for config in [*nothing, {"quantization_config": {}}]:
        assert stored_quantization_config(config) is None
        assert stored_quantization(config, Catalog.installed()) is None
