"""For plugin authors and for our own tests: a tiny model, fake rollouts, and the contract every strategy must keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marl_core.registry.hooks import Hooks
from marl_core.registry.strategy import FAMILIES, FamilyName, Quantization, Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from marl_core.bank.adapters import AdapterBank
    from marl_core.ppo.types import Rollout


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


def tiny_bank(seed: int = 0, **changes: Any) -> AdapterBank:
    """A bank on the tiny model, without any file."""
    from marl_core.bank.adapters import AdapterBank
    from marl_core.bank.certificate import fingerprint

    model = tiny_model(seed, **changes)
    bank = AdapterBank(model, tiny_tokenizer(), source="tiny")
    bank.fingerprint = fingerprint(model)
    return bank


def fake_rollout(
    texts: Sequence[tuple[str, str]] = (("A good", " film."), ("Bad", " acting"), ("It", "")),
    rows: Sequence[Mapping[str, Any]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Rollout:
    """A rollout of (prompt, response) texts; each response but the last ends with EOS."""
    from marl_core.ppo.types import Prompts, Rollout

    words = tokenizer or tiny_tokenizer()
    prompts = Prompts.of(
        [words(prompt).input_ids for prompt, _ in texts], words.pad_token_id, rows, [prompt for prompt, _ in texts]
    )
    responses = [[*words(response).input_ids, words.eos_token_id] for _, response in texts]
    responses[-1] = responses[-1][:-1] or responses[-1]
    return Rollout.from_responses(prompts, responses, words)


def check_strategy(family: FamilyName, strategy: Strategy, bank: AdapterBank | None = None) -> None:
    """Hold a strategy to its family's contract; AssertionError says precisely what it broke.

    Checked: options survive JSON and back, each option is described, the class has a docstring, the hooks fit, and for
    rewards and references: right shape and dtype, finite, the same answer twice, and the bank, the random state and the
    gradient flags left as they were.
    """
    kind = type(strategy)
    again = kind.model_validate_json(strategy.model_dump_json())
    assert again.model_dump() == strategy.model_dump(), (
        f"{kind.__name__}: its options change when written to JSON and read back"
    )
    assert kind.__doc__, f"{kind.__name__} needs a docstring: its first line is shown by `marl plugins`"
    for name, option in kind.model_fields.items():
        assert option.description, f"{kind.__name__}.{name} needs a description: Field(..., description='...')"
    hooks = Hooks([(strategy, kind.__name__)])
    required = FAMILIES[family].required_hook
    assert required is None or hooks.implements(strategy, required), (
        f"{kind.__name__} has no {required} hook, which family {family} needs"
    )
    if family == "quantization":
        result = hooks.quantization(strategy, "float32")
        assert isinstance(result, Quantization), (
            f"{kind.__name__}.marl_quantization gave a {type(result).__name__}, not a Quantization"
        )
    elif family in ("reward", "reference"):
        _check_numbers(family, strategy, hooks, bank or tiny_bank())


def _check_numbers(family: FamilyName, strategy: Strategy, hooks: Hooks, bank: AdapterBank) -> None:
    import torch

    from marl_core.ppo.scoring import Source, reference_logprobs, score_sources

    name, rollout = type(strategy).__name__, fake_rollout(tokenizer=bank.tokenizer)
    if family == "reward":
        source = Source(name, 1.0, hooks.reward(strategy, bank, bank.tokenizer))
    else:
        reference = hooks.reference(strategy, bank)
    before = _fingerprint(bank)

    def answer() -> torch.Tensor:
        return (
            score_sources(bank, [source], rollout, 2)[0]
            if family == "reward"
            else reference_logprobs(bank, reference, rollout, 1.0, 2)
        )

    first, second = answer(), answer()
    assert torch.equal(first, second), f"{name}: two calls on the same rollout gave different numbers"
    assert bool(first.isfinite().all()), f"{name}: gave a number that isn't finite"
    assert not first.requires_grad, f"{name}: its result requires grad"
    assert _fingerprint(bank) == before, (
        f"{name}: changed the bank (active adapter, trainable set, train mode), or the random state"
    )
    assert family == "reward" or bool((first <= 0).all()), f"{name}: log-probs above 0: {float(first.max()):.3g}"
    assert math.prod(first.shape) > 0


def _fingerprint(bank: AdapterBank) -> tuple[object, ...]:
    import torch

    grads = tuple(p.requires_grad for p in bank.base.parameters())
    return (
        bank.active,
        bank.trainable,
        bank.base.training,
        grads,
        torch.get_rng_state().numpy().tobytes(),
        torch.is_grad_enabled(),
    )
