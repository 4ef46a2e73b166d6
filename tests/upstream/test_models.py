"""Faults of single models, found by the zoo (tests/zoo): each test reproduces one, and fails when it is mended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Still = Callable[[bool, str], None]
MEASURE = "marl_core/bank/measure.py"
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROW = torch.tensor([[10, 11, 12, 13]])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def padded(model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Logits of a row alone, and of the same row with three tokens of padding on its left."""
    ids = torch.nn.functional.pad(ROW, (3, 0))
    mask = (ids != 0).long()
    if "position_ids" in options:
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=ROW).logits, model(input_ids=ids, attention_mask=mask, **options).logits[:, 3:]


def test_a_decoder_swallows_positions(still: Still) -> None:
    """BART's decoder counts positions by columns, padding included; `position_ids` are taken and never read."""
    from transformers import BartConfig, BartForCausalLM

    sizes: dict[str, Any] = {
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 32,
    }
    model = BartForCausalLM(BartConfig(vocab_size=64, d_model=16, init_std=0.3, pad_token_id=0, **sizes)).eval()
    alone, beside = padded(model, position_ids=None)
    still(not torch.allclose(alone, beside, atol=1e-3), MEASURE)


@pytest.mark.filterwarnings("ignore")
def test_generate_gives_robertas_positions_from_zero(still: Still) -> None:
    """RoBERTa's positions begin behind the padding id; `generate` hands in 0, 1, ... and gets another model, even for one row."""
    from transformers import RobertaConfig, RobertaForCausalLM

    model: Any = RobertaForCausalLM(RobertaConfig(**SIZES, is_decoder=True, max_position_embeddings=32)).eval()
    with torch.no_grad():
        right = model(input_ids=ROW).logits[:, -1]
        options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
        found = model.generate(input_ids=ROW, attention_mask=torch.ones_like(ROW), **options).logits[0]
    still(not torch.allclose(found, right, atol=1e-3), MEASURE)


def test_a_causal_model_that_looks_ahead(still: Still) -> None:
    """BertLMHeadModel is listed as a causal language model; with its own defaults it isn't one (a log line says so)."""
    from transformers import AutoModelForCausalLM, BertConfig

    model: Any = AutoModelForCausalLM.from_config(BertConfig(**SIZES, max_position_embeddings=32)).eval()
    with torch.no_grad():
        whole, begun = model(input_ids=ROW).logits[:, :2], model(input_ids=ROW[:, :2]).logits
    still(not torch.allclose(whole, begun, atol=1e-3), MEASURE)


@pytest.mark.parametrize("name", ["Rwkv", "RecurrentGemma"])
def test_padding_enters_a_state(still: Still, name: str) -> None:
    """Recurrent models that take an attention mask and carry padding on in their state all the same."""
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "vocab_size": 64,
        "intermediate_size": 32,
        "pad_token_id": 0,
    }
    if name == "RecurrentGemma":
        sizes |= {"num_attention_heads": 2, "head_dim": 8, "lru_width": 16, "w_init_variance_scale": 4.0}
    model: Any = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    alone, beside = padded(model)
    still(not torch.allclose(alone, beside, atol=1e-3), MEASURE)


@pytest.mark.filterwarnings("ignore")
def test_moshis_cache_gives_other_tokens(still: Still) -> None:
    """The same greedy search over one row that is longer than the window, with a cache and without."""
    from transformers import MoshiConfig, MoshiForCausalLM

    sizes = SIZES | {"head_dim": 8, "num_key_value_heads": 1, "ffn_dim": 32, "sliding_window": 3}
    model: Any = MoshiForCausalLM(MoshiConfig(**sizes)).eval()
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = [
        torch.stack(
            model.generate(input_ids=ROW, attention_mask=torch.ones_like(ROW), use_cache=cache, **options).logits
        )
        for cache in (True, False)
    ]
    still(not torch.allclose(found[0], found[1], atol=1e-3), MEASURE)


def test_noise_of_a_router_in_train_mode(still: Still) -> None:
    """By design: in train mode the same tokens get other logits each time, without any dropout."""
    from transformers import MixtralConfig, MixtralForCausalLM

    model: Any = MixtralForCausalLM(
        MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=4, router_jitter_noise=0.5)
    ).train()
    with torch.no_grad():
        first, second = (model(input_ids=ROW).logits for _ in range(2))
    still(not torch.equal(first, second), "marl_core/bank/trunk.py: one mode for every pass")


class Twice(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.first(x)))
        return found


@pytest.mark.filterwarnings("ignore")
def test_merging_into_a_weight_that_two_layers_share(still: Still) -> None:
    """Each layer has its own LoRA; merged, both are added to the one weight, and nobody says so (Zamba's shared blocks)."""
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(
        Twice(),
        LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False),
    ).eval()
    x = torch.randn(1, 8)
    with torch.no_grad():
        before = model(x)
        after = model.merge_and_unload()(x)
    still(not torch.allclose(before, after, atol=1e-3), "marl_core/bank/merge.py")


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_laguna_is_not_read_back(still: Still, tmp_path: Path) -> None:
    """The names of its shared experts are changed on reading although they are right: the weights are lost without a word."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LagunaConfig, LagunaForCausalLM

    config = LagunaConfig(
        **SIZES, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, max_position_embeddings=32,
    )  # fmt: skip
    LagunaForCausalLM(config).save_pretrained(tmp_path / "base")
    options = LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules="all-linear")
    saved: Any = get_peft_model(LagunaForCausalLM.from_pretrained(tmp_path / "base"), options).eval()
    saved.save_pretrained(tmp_path / "adapter")
    read: Any = PeftModel.from_pretrained(LagunaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        same = torch.allclose(saved(input_ids=ROW).logits, read.eval()(input_ids=ROW).logits, atol=1e-3)
    still(not same, "marl_core/bank/peft_adapters.py")
