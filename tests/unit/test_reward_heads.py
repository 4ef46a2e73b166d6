"""Score heads of every make: read as transformers' own classifier reads them, or refused by name."""

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
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    MptConfig,
    MptForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from marl_core import AdapterBank, DataError, Plan
from marl_core.testing import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Model has .tie_word_embeddings")
MakeConfig = Callable[..., Any]
Write = Callable[..., str]
IDS = torch.tensor([[36, 224, 74, 82], [37, 68, 71, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
T: dict[str, Any] = {"vocab_size": 260, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
L: dict[str, Any] = {**T, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
RIGHT: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**T, n_embd=32, n_layer=2, n_head=4, n_positions=64)), ["c_attn"]),
    "neox": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**L, intermediate_size=64)), ["query_key_value"]),
    "bloom": (lambda: BloomForCausalLM(BloomConfig(**T, hidden_size=32, n_layer=2, n_head=4)), ["query_key_value"]),
    "falcon": (lambda: FalconForCausalLM(FalconConfig(**L)), ["query_key_value"]),
    "mpt": (lambda: MptForCausalLM(MptConfig(**T, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)), ["Wqkv"]),
    "gemma2": (
        lambda: Gemma2ForCausalLM(Gemma2Config(**L, intermediate_size=64, num_key_value_heads=2, head_dim=8)),
        ["q_proj"],
    ),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**L, intermediate_size=64, num_key_value_heads=2)), ["q_proj"]),
}


def save(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("what", RIGHT)
@torch.no_grad()
def test_right(write_reward_adapter: Write, make_config: MakeConfig, tmp_path: Path, what: str) -> None:
    build, targets = RIGHT[what]
    torch.manual_seed(0)
    base = save(build(), tmp_path / "base")
    adapter = write_reward_adapter(base, tmp_path / "reward", target_modules=targets)
    assert Plan.of(make_config(model={"path": base}, reward={"use": "adapter", "path": adapter})).check() == []
    config = tmp_path / "reward" / "adapter_config.json"  # which base it was is told by its weights elsewhere
    config.write_text(
        json.dumps({**json.loads(config.read_text(encoding="utf-8")), "base_model_name_or_path": "/gone"})
    )
    bank = AdapterBank.from_pretrained(base, device="cpu")
    bank.load_reward(adapter)
    assert not any(module.training for module in bank.base.modules())
    judge: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    judge.config.pad_token_id = 0
    wanted = PeftModel.from_pretrained(judge, adapter).eval()(input_ids=IDS, attention_mask=MASK).logits[:, 0]
    torch.testing.assert_close(bank.compute_reward_score(IDS, MASK.bool()), wanted, rtol=0, atol=1e-5)


OTHERWISE: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "a pooled state": (
        lambda: BertLMHeadModel(BertConfig(**L, intermediate_size=64, is_decoder=True)),
        ["query", "value"],
    ),
    "a transformed state": (
        lambda: ModernBertDecoderForCausalLM(
            ModernBertDecoderConfig(**L, intermediate_size=64, cls_token_id=1, sep_token_id=2, local_attention=8)
        ),
        ["q_proj", "v_proj"],
    ),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_a_classifier_that_reads_otherwise_is_refused(
    write_reward_adapter: Write, make_config: MakeConfig, tmp_path: Path, what: str
) -> None:
    build, targets = OTHERWISE[what]
    torch.manual_seed(0)
    base = save(build(), tmp_path / "base")
    adapter = write_reward_adapter(base, tmp_path / "reward", target_modules=targets)
    found = Plan.of(make_config(model={"path": base}, reward={"use": "adapter", "path": adapter})).check()
    assert any("scores a pooled or transformed state" in finding and "reward: model" in finding for finding in found)
    bank = AdapterBank.from_pretrained(base, device="cpu")
    with pytest.raises(DataError, match="doesn't score with one linear head on the last token's hidden state"):
        bank.load_reward(adapter)
    assert bank.adapters == []
    assert bank.heads == {}


def test_every_model_type_with_such_a_classifier_is_known() -> None:
    """transformers' classes: those with one linear layer whose code doesn't look for the last token that isn't padding."""
    import inspect

    import transformers
    from transformers.modeling_layers import GenericForSequenceClassification
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    from marl_core.artifacts.architecture import POOLED_CLASSIFIERS

    found = set()
    for kind in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES):
        name: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[kind]
        classifier = getattr(transformers, name)
        source = inspect.getsource(classifier)
        plain = issubclass(classifier, GenericForSequenceClassification) or (
            "last_non_pad" in source and "PredictionHead(" not in source
        )
        if not plain and "self.classifier = nn.Linear(" in source:
            found.add(kind)
    assert found == set(POOLED_CLASSIFIERS)


def change(folder: str, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = Path(folder) / "adapter_model.safetensors"
    save_file(edit(load_file(file)), file)


SCORE = "base_model.model.score.weight"


def without(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    "names",
    [
        ("base_model.model.score.modules_to_save.default.weight", "base_model.model.score.original_module.weight"),
        ("base_model.model.score.modules_to_save.weight",),
    ],
)
def test_names_of_old_pefts(
    tiny_folder: str, write_reward_adapter: Write, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """Where the wrapper's own names were left in the file, the trained head is the one under modules_to_save."""
    folder = write_reward_adapter(tiny_folder, tmp_path / "it")
    bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
    bank.load_reward(folder)
    wanted = bank.compute_reward_score(IDS, MASK.bool())
    head = load_file(f"{folder}/adapter_model.safetensors")[SCORE]
    heads = dict(zip(names, (head, torch.zeros_like(head)), strict=False))
    change(folder, lambda tensors: without(tensors, SCORE) | heads)
    again = AdapterBank.from_pretrained(tiny_folder, device="cpu")
    again.load_reward(folder)
    assert torch.equal(again.compute_reward_score(IDS, MASK.bool()), wanted)


REFUSED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str, str]] = {
    "two labels": (
        lambda tensors: tensors | {SCORE: torch.zeros(2, 32)},
        r"this model needs \[1, 32\], one label",
        "num_labels=1",
    ),
    "a head of two layers": (
        lambda tensors: (
            without(tensors, SCORE)
            | {"base_model.model.classifier.dense.weight": torch.zeros(32, 32)}
            | {"base_model.model.classifier.out_proj.weight": torch.zeros(1, 32)}
        ),
        "single linear head",
        "this base needs one of shape",
    ),
    "a head of another name": (
        lambda tensors: without(tensors, SCORE) | {"base_model.model.regression_head.weight": torch.zeros(1, 32)},
        "whole weights of regression_head",
        "holds no score weights",
    ),
    "a head that only a LoRA changed": (
        lambda tensors: (
            without(tensors, SCORE)
            | {"base_model.model.score.lora_A.weight": torch.zeros(4, 32)}
            | {"base_model.model.score.lora_B.weight": torch.zeros(1, 4)}
        ),
        "holds no score weights",
        "holds no score weights",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_heads_that_are_refused(
    tiny_folder: str, write_reward_adapter: Write, make_config: MakeConfig, tmp_path: Path, what: str
) -> None:
    edit, by_check, at_load = REFUSED[what]
    folder = write_reward_adapter(tiny_folder, tmp_path / "it")
    change(folder, edit)
    found = Plan.of(make_config(reward={"use": "adapter", "path": folder})).check()
    assert any(re.search(by_check, finding) for finding in found), found
    with pytest.raises(DataError, match=at_load):
        AdapterBank.from_pretrained(tiny_folder, device="cpu").load_reward(folder)


def test_a_reward_adapter_with_the_output_layer_among_its_targets(
    tiny_folder: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    """LLaMA-Factory trains rewards on the causal model, so its targets may name the output layer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "lm_head"])
    get_peft_model(model, config).save_pretrained(str(tmp_path / "it"), save_embedding_layers=False)
    save_file({"v_head.summary.weight": torch.ones(1, 32)}, tmp_path / "it" / "value_head.safetensors")
    found = Plan.of(make_config(reward={"use": "adapter", "path": str(tmp_path / "it")})).check()
    assert any(
        "adapts the output layer (lm_head)" in finding and "Train the reward adapter again" in finding
        for finding in found
    )
    with pytest.raises(DataError, match="adapts the output layer"):
        AdapterBank.from_pretrained(tiny_folder, device="cpu").load_reward(tmp_path / "it")


def test_a_pickled_head_is_told_by_check(tiny_folder: str, make_config: MakeConfig, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
        str(tmp_path / "it")
    )
    (tmp_path / "it" / "value_head.bin").write_bytes(b"not even a pickle")
    (found,) = Plan.of(make_config(reward={"use": "adapter", "path": str(tmp_path / "it")})).check()
    assert "never opens: save it again as value_head.safetensors" in found
