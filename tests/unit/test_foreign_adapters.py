"""Adapters as other tools write them: the numbers are those of plain peft, or `marl check` and the bank say why not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from marl_core import AdapterBank, ConfigError, DataError, Plan, merge_into
from marl_core.bank.base import load_base
from marl_core.bank.merge import merge_adapter

IDS = torch.tensor([[36, 224, 74, 82], [37, 68, 71, 5]])
ROUNDING = 1e-5  # float32: packing and fused attention against the plain passes are off by about 1e-6
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:RuntimeWarning:peft")


def write(base: str, folder: Path, seed: int = 1, save: dict[str, Any] | None = None, **options: Any) -> Path:
    """An adapter as peft alone writes it, every tensor of it random."""
    model = AutoModelForCausalLM.from_pretrained(base)
    wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}))
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.1)
    wrapped.save_pretrained(str(folder), **(save or {}))
    return folder


def edit(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    return folder


def rename(folder: Path, change: Callable[[str], str]) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)
    return folder


def add_tensors(folder: Path, **tensors: Tensor) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}, file)
    return folder


@torch.no_grad()
def plain(base: str, folder: Path) -> Tensor:
    """Logits by plain peft."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
    found: Tensor = model(IDS).logits
    return found


@torch.no_grad()
def through_bank(base: str, folder: Path, trainable: bool = False) -> Tensor:
    """Logits by the bank, the way a run computes them, beside an adapter that was there before."""
    bank = AdapterBank.from_pretrained(base, device="cpu")
    bank.load("first", write(base, folder.parent / f"{folder.name}-beside", seed=7, target_modules=["o_proj"]))
    bank.load("it", folder, trainable=trainable)
    with bank.using("it"):
        return bank.trunk.logits_of(bank.trunk.hidden(IDS, torch.ones_like(IDS, dtype=torch.bool)))


MakeConfig = Callable[..., Any]
SFT = ["q_proj", "v_proj"]

RIGHT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "names that this model lacks": (
        {"target_modules": SFT},
        {"target_modules": [*SFT, "c_attn", "W_pack", "query_key_value"]},
    ),
    "a regular expression": ({"target_modules": r".*\.layers\.1\..*(q|down)_proj"}, {}),
    "full paths": ({"target_modules": ["model.layers.0.mlp.up_proj", "layers.1.self_attn.k_proj"]}, {}),
    "all linear": ({"target_modules": "all-linear"}, {"target_modules": "all-linear"}),
    "modules left out": ({"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.0\..*"}, {}),
    "some layers": ({"target_modules": SFT, "layers_to_transform": [1], "layers_pattern": "layers"}, {}),
    "a rank for each": ({"target_modules": SFT, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, {}),
    "rsLoRA": ({"target_modules": SFT, "use_rslora": True}, {}),
    "DoRA": ({"target_modules": SFT, "use_dora": True}, {}),
    "LoRA with bias": ({"target_modules": SFT, "lora_bias": True}, {}),
    "an orthogonal start": ({"target_modules": SFT, "init_lora_weights": "gaussian"}, {}),
    "a start by EVA": ({"target_modules": SFT}, {"init_lora_weights": "eva", "eva_config": {"rho": 1.0}}),
    "an orthogonal start by peft": ({"target_modules": SFT, "init_lora_weights": "orthogonal"}, {}),
    "Unsloth's config": (
        {"target_modules": SFT},
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "x"}, "task_type": None},
    ),
    "options of a later peft": ({"target_modules": SFT}, {"an_option_of_tomorrow": None}),
    "a base that was quantized for training": (
        {"target_modules": SFT},
        {"base_model_name_or_path": "unsloth/tiny-bnb-4bit"},
    ),
    "no layer's list of modules to save": ({"target_modules": SFT}, {"modules_to_save": []}),
    "the embedding among the targets": ({"target_modules": ["q_proj", "embed_tokens"]}, {}),
}


@pytest.mark.parametrize("what", RIGHT)
@pytest.mark.parametrize("trainable", [False, True])
def test_right_as_plain_peft_is(
    tiny_folder: str, make_config: MakeConfig, tmp_path: Path, what: str, trainable: bool
) -> None:
    options, changes = RIGHT[what]
    folder = edit(write(tiny_folder, tmp_path / "it", save={"save_embedding_layers": False}, **options), **changes)
    wanted = plain(tiny_folder, folder)
    assert (
        float(
            (wanted - plain(tiny_folder, write(tiny_folder, tmp_path / "other", target_modules=["k_proj"]))).abs().max()
        )
        > 0.1
    )
    torch.testing.assert_close(through_bank(tiny_folder, folder, trainable), wanted, rtol=0, atol=ROUNDING)
    policy = {"start": "continue", "from": str(folder)}
    assert Plan.of(make_config(policy=policy, reference={"use": "peft-adapter", "adapter": str(folder)})).check() == []
    bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
    bank.load("it", folder, trainable=trainable)
    bank.save("it", tmp_path / "again")
    assert torch.equal(plain(tiny_folder, tmp_path / "again"), wanted)


def test_peft_s_default_name_left_in_the_tensors_names(tiny_folder: str, tmp_path: Path) -> None:
    """Trainers that save a state dict by themselves: plain peft reads such a file under its default name."""
    folder = write(tiny_folder, tmp_path / "it", target_modules=SFT)
    wanted = plain(tiny_folder, folder)
    rename(folder, lambda name: name.replace(".weight", ".default.weight"))
    assert torch.equal(plain(tiny_folder, folder), wanted)
    torch.testing.assert_close(through_bank(tiny_folder, folder), wanted, rtol=0, atol=ROUNDING)


def write_packed(base: str, folder: Path, **options: Any) -> str:
    """The model as bitsandbytes' users upload it."""
    from transformers import BitsAndBytesConfig

    AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**options)).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


Spoil = Callable[[str, Path], object]


def resized(base: str, folder: Path) -> None:
    """An SFT run that added two tokens."""
    words, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model.resize_token_embeddings(262)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=SFT))
    wrapped.save_pretrained(str(folder), save_embedding_layers=True)
    words.save_pretrained(str(folder))


REFUSED: dict[str, tuple[Spoil, str]] = {
    "saved embeddings": (
        lambda base, folder: write(base, folder, target_modules=SFT, modules_to_save=["embed_tokens", "lm_head"]),
        "saved embeddings",
    ),
    "added tokens": (resized, "added tokens"),
    "a saved norm": (
        lambda base, folder: write(base, folder, target_modules=SFT, modules_to_save=["norm"]),
        r"whole weights of model\.layers\.0\.input_layernorm, .*\(modules_to_save\)",
    ),
    "single tokens": (
        lambda base, folder: write(base, folder, target_modules=SFT, trainable_token_indices=[5, 6]),
        "trainable_token_indices",
    ),
    "the output layer among the targets": (
        lambda base, folder: write(
            base, folder, target_modules=["q_proj", "lm_head"], save={"save_embedding_layers": False}
        ),
        r"adapts the output layer \(lm_head\)",
    ),
    "an activated LoRA": (
        lambda base, folder: write(base, folder, target_modules=SFT, alora_invocation_tokens=[80, 90]),
        "is an activated LoRA",
    ),
    "KaSA": (
        lambda base, folder: edit(write(base, folder, target_modules=SFT), kasa_config={"beta": 1e-4}),
        "rewrites the base's weights when it is made",
    ),
    "PiSSA": (
        lambda base, folder: edit(write(base, folder, target_modules=SFT), init_lora_weights="pissa_niter_4"),
        "'pissa_niter_4', which rewrites the base's weights",
    ),
    "biases of the base": (
        lambda base, folder: edit(write(base, folder, target_modules=SFT), bias="all"),
        "was trained with bias: 'all'",
    ),
    "another kind": (
        lambda base, folder: edit(write(base, folder, target_modules=SFT), peft_type="LOHA"),
        "says that it is a LoHa adapter, and its file holds tensors of another kind",
    ),
    "a prompt": (
        lambda base, folder: edit(write(base, folder, target_modules=SFT), peft_type="PREFIX_TUNING"),
        "is a PREFIX_TUNING adapter",
    ),
    "shards that weren't gathered": (
        lambda base, folder: add_tensors(
            write(base, folder, target_modules=SFT),
            base_model__model__model__layers__0__self_attn__k_proj__lora_A__weight=torch.zeros(0),
        ),
        "DeepSpeed ZeRO-3",
    ),
    "a compiled model": (
        lambda base, folder: rename(
            write(base, folder, target_modules=SFT), lambda name: name.replace("model.model.", "model._orig_mod.model.")
        ),
        "in a way that peft doesn't read .*_orig_mod",
    ),
    "a prefix twice": (
        lambda base, folder: rename(write(base, folder, target_modules=SFT), lambda name: f"base_model.model.{name}"),
        "in a way that peft doesn't read",
    ),
    "no prefix": (
        lambda base, folder: rename(
            write(base, folder, target_modules=SFT), lambda name: name.removeprefix("base_model.model.")
        ),
        "in a way that peft doesn't read",
    ),
    "an adapter's name in its tensors": (
        lambda base, folder: rename(
            write(base, folder, target_modules=SFT), lambda name: name.replace(".weight", ".policy.weight")
        ),
        r"an adapter's name in its tensors' names \('policy'\)",
    ),
    "a value head among the tensors": (
        lambda base, folder: add_tensors(
            write(base, folder, target_modules=SFT), v_head__summary__weight=torch.zeros(1, 32)
        ),
        "a value head among its tensors",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(tiny_folder: str, make_config: MakeConfig, tmp_path: Path, what: str) -> None:
    spoil, sentence = REFUSED[what]
    spoil(tiny_folder, tmp_path / "it")
    bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
    with pytest.raises(DataError, match=sentence) as caught:
        bank.load("it", tmp_path / "it", asked_by="policy.from")
    assert "another base" not in str(caught.value)
    assert bank.adapters == []
    policy, reference = (
        {"start": "continue", "from": str(tmp_path / "it")},
        {"use": "peft-adapter", "adapter": str(tmp_path / "it")},
    )
    for key, config in {
        "policy.from": make_config(policy=policy, reference=reference),
        "reference.adapter": make_config(reference={**reference, "allow_mismatch": True}),
        "reward.path": make_config(reward={"use": "adapter", "path": str(tmp_path / "it")}),
    }.items():
        found = [finding for finding in Plan.of(config).check() if finding.startswith(key)]
        assert found, key
        assert re.search(sentence, " ".join(found)), (key, found)


@torch.no_grad()
def merged_by_peft(base: str, folder: Path, rows: int = 260) -> Tensor:
    """Logits of base and adapter by plain peft, rows for added tokens made first as its documentation says."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows != 260:
        model.resize_token_embeddings(rows)
    found: Tensor = PeftModel.from_pretrained(model, str(folder)).eval()(IDS).logits
    return found


MERGED: dict[str, dict[str, Any]] = {
    "a plain LoRA": {"target_modules": SFT},
    "DoRA": {"target_modules": SFT, "use_dora": True},
    "saved embeddings": {"target_modules": SFT, "modules_to_save": ["embed_tokens", "lm_head"]},
    "a saved norm": {"target_modules": SFT, "modules_to_save": ["norm"]},
    "single tokens": {"target_modules": SFT, "trainable_token_indices": [36, 37, 74]},
    "the output layer, tied to the embedding": {"target_modules": ["q_proj", "lm_head"]},
    "the embedding, tied to the output layer": {"target_modules": ["q_proj", "embed_tokens"]},
    "an adapter made by PiSSA": {"target_modules": SFT, "init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("what", MERGED)
def test_merged_as_peft_merges(tiny_folder: str, make_config: MakeConfig, tmp_path: Path, what: str) -> None:
    folder = write(tiny_folder, tmp_path / "it", save={"save_embedding_layers": False}, **MERGED[what])
    wanted = merged_by_peft(tiny_folder, folder)
    reference = {"use": "merged-base", "adapter": str(folder)}
    assert Plan.of(make_config(reference=reference)).check() == []
    report = merge_adapter(tiny_folder, str(folder), tmp_path / "out")
    assert report.max_logit_difference < ROUNDING * 10
    with torch.no_grad():
        torch.testing.assert_close(load_base(str(tmp_path / "out"))(IDS).logits, wanted, rtol=0, atol=ROUNDING * 10)


def test_added_tokens_are_merged_with_their_tokenizer(
    tiny_folder: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    resized(tiny_folder, tmp_path / "it")
    (found,) = Plan.of(make_config(reference={"use": "merged-base", "adapter": str(tmp_path / "it")})).check()
    assert re.search(
        r"embeddings for 262 tokens .* the base has 260: .*added tokens.*marl_core.merge_adapter\(BASE", found
    )
    with pytest.raises(DataError, match="embeddings for 262 tokens"):
        merge_into(load_base(tiny_folder), tmp_path / "it")
    merge_adapter(tiny_folder, str(tmp_path / "it"), tmp_path / "out")
    with torch.no_grad():
        found_logits = load_base(str(tmp_path / "out"))(IDS).logits
    torch.testing.assert_close(
        found_logits, merged_by_peft(tiny_folder, tmp_path / "it", 262), rtol=0, atol=ROUNDING * 10
    )
    bank = AdapterBank.from_pretrained(str(tmp_path / "out"), device="cpu")
    assert bank.tokenizer.convert_tokens_to_ids("<|im_end|>") == 261


@pytest.mark.parametrize("file", ["value_head.safetensors", "value_head.bin"])
def test_a_head_beside_the_adapter_is_never_lost(
    tiny_folder: str, make_config: MakeConfig, tmp_path: Path, file: str
) -> None:
    """LLaMA-Factory keeps a reward adapter's head beside it."""
    folder = write(tiny_folder, tmp_path / "it", target_modules=SFT)
    if file.endswith(".bin"):
        (folder / file).write_bytes(b"not even a pickle")
    else:
        save_file({"v_head.summary.weight": torch.zeros(1, 32)}, folder / file)
    found = Plan.of(make_config(reference={"use": "merged-base", "adapter": str(folder)})).check()
    assert any("merging it would lose the head" in finding and file in finding for finding in found)
    with pytest.raises(DataError, match="merging it would lose the head"):
        merge_adapter(tiny_folder, str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    policy = {"start": "continue", "from": str(folder)}
    plan = Plan.of(make_config(policy=policy, reference={"use": "peft-adapter", "adapter": str(folder)}))
    assert plan.check() == []
    assert any(file in warning and "value head beside it" in warning for warning in plan.warnings())


def test_an_activated_lora_is_not_merged(tiny_folder: str, make_config: MakeConfig, tmp_path: Path) -> None:
    folder = write(tiny_folder, tmp_path / "it", target_modules=SFT, alora_invocation_tokens=[80, 90])
    (found,) = Plan.of(make_config(reference={"use": "merged-base", "adapter": str(folder)})).check()
    assert "is an activated LoRA" in found
    with pytest.raises(DataError, match="is an activated LoRA"):
        merge_into(load_base(tiny_folder), folder)


def test_a_quantized_base_is_not_merged_into(wide_folder: str, tmp_path: Path) -> None:
    folder = write(wide_folder, tmp_path / "it", target_modules=SFT)
    packed = write_packed(wide_folder, tmp_path / "packed", load_in_4bit=True)
    with pytest.raises(ConfigError, match=r"^adapter: merging needs the full-precision .* this one is quantized"):
        merge_adapter(packed, str(folder), tmp_path / "out")
