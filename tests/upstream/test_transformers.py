"""Faults of transformers, and what its callers must know: each test reproduces one, and fails when it is mended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from marl_core.testing import tiny_model

Still = Callable[[bool, str], None]
IDS = torch.tensor([[10, 11, 12, 13]])


def classifier(**changes: Any) -> Any:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    config = tiny_model(**changes).config
    config.num_labels = 1
    model: Any = LlamaForSequenceClassification(config)
    return model.eval()


def test_pad_is_eos_moves_the_reward(still: Still) -> None:
    """The text ends with EOS and every token is attended, yet the token before EOS is scored."""
    model = classifier(pad_token_id=2, eos_token_id=2)
    ids = torch.tensor([[10, 11, 12, 2]])
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        states = model.model(input_ids=ids).last_hidden_state[0]
        each = model.score(states)
    assert not torch.allclose(each[2], each[3], atol=1e-3)
    still(bool(torch.allclose(found, each[2], atol=1e-5)), "marl_core/bank/heads.py")


def test_left_padding_moves_a_classifiers_positions(still: Still) -> None:
    """A model with learned positions scores a text by how much padding stands before it."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2, pad_token_id=0,
        initializer_range=0.5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.num_labels = 1
    model: Any = GPT2ForSequenceClassification(config).eval()
    padded = torch.nn.functional.pad(IDS, (5, 0))
    mask = (padded != 0).long()
    with torch.no_grad():
        alone = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        beside = model(input_ids=padded, attention_mask=mask).logits
        right = model(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(right, alone)
    still(not torch.allclose(beside, alone, atol=1e-3), "marl_core/bank/trunk.py")


def test_a_models_habits_leak_into_generate(still: Still) -> None:
    """What a caller's GenerationConfig leaves unset is filled up from the model folder's own."""
    from transformers import GenerationConfig

    plain: Any = tiny_model()
    asked = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    before = plain.generate(input_ids=IDS, generation_config=GenerationConfig(**asked))
    plain.generation_config.repetition_penalty = 50.0
    after = plain.generate(input_ids=IDS, generation_config=GenerationConfig(**asked))
    still(not torch.equal(before, after), "marl_core/bank/trunk.py")


def test_greedy_search_over_nan_gives_token_0(still: Still) -> None:
    model: Any = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    found = model.generate(input_ids=IDS, do_sample=False, max_new_tokens=3, eos_token_id=None, pad_token_id=0)
    still(found[0, IDS.shape[1] :].tolist() == [0, 0, 0], "marl_core/safety/step_checks.py")


def test_more_tokens_than_positions_run_in_silence(still: Still, recwarn: pytest.WarningsRecorder) -> None:
    model: Any = tiny_model(max_position_embeddings=4)
    with torch.no_grad():
        found = model(input_ids=torch.full((1, 9), 10)).logits
    still(bool(found.isfinite().all()) and not len(recwarn), "marl_core/data/prompts.py")


def test_missing_weights_are_drawn_at_random(still: Still, tmp_path: Path) -> None:
    """A model folder without one tensor loads, and two loads differ there."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    missing = "model.layers.0.self_attn.q_proj.weight"
    save_file({name: t for name, t in load_file(file).items() if name != missing}, file, metadata={"format": "pt"})
    loads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
        loads.append(model.state_dict()[missing])
    still(not torch.equal(*loads), "marl_core/bank/base.py")
