"""A tiny model and its tokenizer, built in code, and rollouts that nobody sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from marl_core.bank.adapters import AdapterBank
    from marl_core.ppo.types import Rollout

TEXTS = (("A good", " film."), ("Bad", " acting"), ("It", ""))
"""Prompts and responses for whoever needs some."""


def tiny_tokenizer(pad_is_eos: bool = False) -> PreTrainedTokenizerBase:
    """A byte tokenizer with 260 tokens, built in code: <pad>, <bos>, <eos>, <unk> and the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<eos>" if pad_is_eos else "<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def tiny_model(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random Llama of two layers and width 32 for `tiny_tokenizer`, float32; `changes` go into its config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**{**options, **changes}))
        model.eval()
        return model


def write_tiny_model(folder: Path | str, seed: int = 0, pad_is_eos: bool = False, **changes: Any) -> str:
    """Save tiny model and tokenizer as a model folder; its path."""
    tiny_model(seed, **changes).save_pretrained(folder)
    tiny_tokenizer(pad_is_eos).save_pretrained(folder)
    return str(folder)


def tiny_bank(seed: int = 0, policy: str | None = None, device: str = "cpu", **changes: Any) -> AdapterBank:
    """A bank on the tiny model, without any file, on `device`; with a new, trainable LoRA when `policy` names one."""
    from marl_core.bank.adapters import AdapterBank
    from marl_core.bank.identity.fingerprint import fingerprint

    moved: Any = tiny_model(seed, **changes)  # torch types `to` loosely
    model: PreTrainedModel = moved.to(device)
    bank = AdapterBank(model, tiny_tokenizer(), source="tiny")
    bank.fingerprint = fingerprint(model)
    if policy is not None:
        add_policy(bank, policy)
    return bank


def add_policy(bank: AdapterBank, name: str = "policy") -> None:
    """A new, trainable LoRA on all linear layers, as a run adds its policy before it asks for reference and rewards."""
    from marl_core.testing import kinds

    bank.add(name, kinds.make_config(4, 8, "all-linear", 0.0, {}, bank.linears), seed=0)


def fake_rollout(
    texts: Sequence[tuple[str, str]] = TEXTS,
    rows: Sequence[Mapping[str, Any]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Rollout:
    """A rollout of (prompt, response) texts; each response but the last ends with EOS."""
    from marl_core.ppo.types import Prompts, Rollout

    tokenizer = tokenizer or tiny_tokenizer()
    prompts = Prompts.of(
        [tokenizer(prompt).input_ids for prompt, _ in texts],
        tokenizer.pad_token_id,
        rows,
        [prompt for prompt, _ in texts],
    )
    responses = [[*tokenizer(response).input_ids, tokenizer.eos_token_id] for _, response in texts]
    responses[-1] = responses[-1][:-1] or responses[-1]
    return Rollout.from_responses(prompts, responses, tokenizer)
