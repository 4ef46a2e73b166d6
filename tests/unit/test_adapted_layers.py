"""Which layers of a model a LoRA changes: odd ones are left out of all-linear, and named when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    ElectraConfig,
    ElectraForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)
from transformers.models.jamba import modeling_jamba

from marl_core import AdapterBank, ConfigError, Plan
from marl_core.bank.heads import apply_head
from marl_core.testing import tiny_model, tiny_tokenizer
from marl_core.testing.kinds import make_config as lora_config

MakeConfig = Callable[..., Any]
Write = Callable[..., str]
IDS = torch.tensor([[36, 224, 74, 82], [37, 68, 71, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
TOKENS: dict[str, Any] = {"vocab_size": 260, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


class Odd(nn.Linear):
    """A linear layer that its model reads more of than PEFT's wrapper has."""

    stride = 3


class OddMLP(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.odd = Odd(32, 32)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.mlp(x) + self.odd(x) * self.odd.stride
        return found


def with_an_odd_layer() -> Any:
    model: Any = tiny_model()
    model.model.layers[1].mlp = OddMLP(model.model.layers[1].mlp)
    return model


def mamba() -> Any:
    return MambaForCausalLM(MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=8))


def phimoe() -> Any:
    return PhimoeForCausalLM(PhimoeConfig(**SIZES, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2))


def jamba() -> Any:
    config = JambaConfig(
        **SIZES, num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=8,
        use_mamba_kernels=False,
    )  # fmt: skip
    return JambaForCausalLM(config)


def bank_on(model: Any) -> AdapterBank:
    return AdapterBank(model.eval(), tiny_tokenizer(), source="tiny")


ROUTER = set() if hasattr(modeling_jamba, "JambaTopKRouter") else {"router"}
"""Jamba's is a plain linear layer in transformers 5.17."""
LEFT_OUT = {
    "weights read by a scan": (mamba, {"in_proj", "x_proj"}, ["out_proj", "dt_proj"]),
    "weights read by a scan beside attention": (
        jamba,
        {"down_proj", "gate_proj", "in_proj", "k_proj", "o_proj", "out_proj", "q_proj", "up_proj", "v_proj", "x_proj"}
        | ROUTER,
        ["dt_proj"],
    ),
    "a router that gives a tuple": (phimoe, {"k_proj", "o_proj", "q_proj", "v_proj"}, ["router"]),
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_all_linear_is_what_a_lora_changes(what: str) -> None:
    build, kept, left = LEFT_OUT[what]
    torch.manual_seed(0)
    bank = bank_on(build())
    config = lora_config(4, 8, "all-linear", 0.0, {}, bank.linears)
    assert {target.rsplit(".", 1)[-1] for target in config.target_modules or ()} == kept
    bank.add("policy", config, seed=0)
    with bank.using("policy"):
        bank.trunk.hidden(IDS, MASK.bool()).square().mean().backward()
    moved = {name: p.grad for name, p in bank.parameters("policy").items() if "lora_B" in name}
    assert moved
    assert all(gradient is not None and bool(gradient.any()) for gradient in moved.values())
    for target in left:
        with pytest.raises(
            ConfigError, match=rf"\['{target}'\] name no linear layer .* doesn't call .*{target}.* It has: "
        ):
            lora_config(4, 8, [min(kept), target], 0.0, {}, bank.linears)


def test_idle_layers_are_found_also_after_an_adapter_was_loaded() -> None:
    torch.manual_seed(0)
    bank = bank_on(mamba())
    bank.add("first", LoraConfig(target_modules=["in_proj"]))
    assert {name.rsplit(".", 1)[-1] for name in bank.linears} == {"in_proj", "x_proj"}
    assert not any("lora" in name for name in [*bank.linears, *bank.linears.idle])


def test_a_name_that_means_something_else_elsewhere_is_written_out() -> None:
    """A router called `gate` beside a linear `gate`: the short name would adapt both."""
    model: Any = tiny_model()
    model.model.layers[0].mlp.gate_proj = nn.Sequential(model.model.layers[0].mlp.gate_proj)
    config = lora_config(4, 8, "all-linear", 0.0, {}, bank_on(model).linears)
    targets = set(config.target_modules or ())
    assert {"model.layers.0.mlp.gate_proj.0", "model.layers.1.mlp.gate_proj"} <= targets
    assert "gate_proj" not in targets
    assert {"q_proj", "up_proj"} <= targets


def test_a_layer_that_breaks_its_model_is_named() -> None:
    bank = bank_on(with_an_odd_layer())
    with pytest.raises(
        ConfigError,
        match=r"mlp\.odd \(Odd\) can't run with an adapter on odd: AttributeError.*e\.g\. down_proj",
    ):
        bank.add("policy", LoraConfig(target_modules=["odd", "q_proj"]))
    assert bank.adapters == []
    assert not any("lora" in name for name, _ in bank.base.named_parameters())
    bank.add("policy", LoraConfig(target_modules=["q_proj"]), seed=0)
    assert len(bank.parameters("policy")) == 4


def test_a_layer_that_peft_can_not_adapt_is_named_with_others() -> None:
    bank = bank_on(tiny_model())
    bank.add("first", LoraConfig(target_modules=["q_proj"]), seed=0)
    before = bank.tensors("first")
    with pytest.raises(
        ConfigError, match=r"peft can't add it .*LlamaRMSNorm.* It can adapt these layers: down_proj, gate_proj"
    ):
        bank.add("policy", LoraConfig(target_modules=["q_proj", "up_proj", "input_layernorm"]))
    assert bank.adapters == ["first"]
    assert not any(".policy" in name for name, _ in bank.base.named_parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in bank.tensors("first").items())
    with bank.bare() as model, torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, tiny_model()(IDS).logits, rtol=0, atol=1e-5)


class TestWidth:
    """The last hidden state's width is not always the LM head's, nor config.json's hidden_size."""

    @pytest.fixture
    def opt(self, tmp_path: Path) -> str:
        """As OPT-350m: embeddings of 16, layers of 32, projected in and out."""
        config = OPTConfig(
            **TOKENS, hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, do_layer_norm_before=False, init_std=0.3,
        )  # fmt: skip
        torch.manual_seed(0)
        OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
        tiny_tokenizer().save_pretrained(tmp_path / "opt")
        return str(tmp_path / "opt")

    @torch.no_grad()
    def test_a_reward_adapter(
        self, opt: str, write_reward_adapter: Write, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        adapter = write_reward_adapter(opt, tmp_path / "reward", target_modules=["q_proj", "fc1"])
        config = make_config(model={"path": opt}, reward={"use": "adapter", "path": adapter})
        assert Plan.of(config).check() == []
        bank = AdapterBank.from_pretrained(opt, device="cpu")
        assert bank.trunk.hidden_size == 16
        bank.load_reward(adapter)
        judge: Any = AutoModelForSequenceClassification.from_pretrained(opt, num_labels=1)
        judge.config.pad_token_id = 0
        wanted = PeftModel.from_pretrained(judge, adapter).eval()(input_ids=IDS, attention_mask=MASK).logits[:, 0]
        torch.testing.assert_close(bank.compute_reward_score(IDS, MASK.bool()), wanted, rtol=0, atol=1e-5)

    def test_a_value_head_of_a_model_whose_head_is_narrower(self) -> None:
        config = ElectraConfig(
            **TOKENS, hidden_size=32, embedding_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            is_decoder=True,
        )  # fmt: skip
        bank = bank_on(ElectraForCausalLM(config))
        assert bank.trunk.hidden_size == 32
        head = bank.add_value_head("value")
        with torch.no_grad():
            states = bank.trunk.hidden(IDS, MASK.bool())
        assert apply_head(head, states).shape == IDS.shape

    def test_looking_leaves_the_model_what_it_is(self) -> None:
        bank = bank_on(tiny_model())
        assert bank.trunk.hidden_size == 32
        assert bank.linears
        assert isinstance(bank.base, LlamaForCausalLM)
