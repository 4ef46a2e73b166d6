"""What names alone say of an architecture, each answer against configs and names as transformers writes them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from marl_core import ConfigError
from marl_core.artifacts import architecture
from marl_core.artifacts.architecture import Architecture
from marl_core.artifacts.lora_targets import matches, unmatched

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 260,
    "max_position_embeddings": 128,
}


def test_it_needs_no_torch() -> None:
    code = (
        "import sys, marl_core.artifacts.architecture, marl_core.artifacts.lora_targets; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_sizes_by_the_usual_keys() -> None:
    found = Architecture.of(LLAMA)
    assert (found.model_type, found.hidden_size, found.layers, found.vocabulary) == ("llama", 64, 3, 260)
    assert (found.attention_heads, found.key_value_heads, found.head_dim) == (4, 2, 16)
    assert (found.feed_forward, found.positions, found.last_widths, found.tied) == (96, 128, (64,), False)


def test_sizes_by_the_keys_of_gpt2() -> None:
    found = Architecture.of(
        {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": None, "n_positions": 32, "vocab_size": 5}
    )
    assert (found.hidden_size, found.layers, found.attention_heads, found.key_value_heads) == (8, 2, 2, 2)
    assert (found.head_dim, found.feed_forward, found.positions) == (4, 32, 32)


def test_sizes_of_the_part_that_text_goes_through() -> None:
    config = {
        "model_type": "llava",
        "hidden_size": 1,
        "tie_word_embeddings": False,
        "text_config": {**LLAMA, "tie_word_embeddings": True},
    }
    found = Architecture.of(config)
    assert (found.model_type, found.hidden_size, found.tied) == ("llava", 64, True)


def test_what_a_config_does_not_say() -> None:
    found = Architecture.of({"hidden_size": None, "num_hidden_layers": "3"})
    assert (found.model_type, found.hidden_size, found.layers, found.head_dim, found.positions) == (None, 0, 0, 0, None)


@pytest.mark.parametrize(
    ("config", "most"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"max_position_embeddings": None, "n_positions": 8}, 8),
        ({"seq_length": 16}, 16),
        ({"max_position_embeddings": 2**31}, None),
        ({"max_position_embeddings": 64, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32}}, 128),
        ({"max_position_embeddings": 64, "rope_parameters": {"factor": 4.0}}, 64),
        ({"max_position_embeddings": 64, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": "odd"}, 64),
    ],
)
def test_positions(config: dict[str, Any], most: int | None) -> None:
    assert architecture.positions(config) == most


def test_window() -> None:
    assert architecture.window({"sliding_window": 8, "attention_chunk_size": 4, "max_window_layers": 2}) == 4
    assert architecture.window({"sliding_window": None, "use_sliding_window": True}) == 2**62


def test_special_tokens() -> None:
    config = {"eos_token_id": [1, 2], "pad_token_id": None, "image_token_index": 7, "vocab_size": 9}
    assert architecture.special_tokens(config) == {1, 2, 7}


NAMES = {
    "model.embed_tokens.weight": (9, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.self_attn.q_proj.bias": (4,),
    "model.layers.10.mlp.experts.down_proj": (2, 4, 8),
    "model.norm.weight": (4,),
    "transformer.wpe.weight": (16, 4),
    "model.vision_embed.proj.weight": (4, 4),
    "transformer.output_layer.weight": (9, 4),
    "lm_head.weight": (9, 4),
}


def test_linear_layers_are_neither_embeddings_nor_output_layers() -> None:
    assert dict(architecture.linear_layers(NAMES)) == {"model.layers.0.self_attn.q_proj": (4, 4)}


def test_rows_of_tokens() -> None:
    assert architecture.token_rows(NAMES) == {
        "model.embed_tokens.weight": 9,
        "transformer.output_layer.weight": 9,
        "lm_head.weight": 9,
    }


def test_a_tied_output_layer_is_counted_once() -> None:
    assert architecture.counted_once(NAMES, tied=False) == NAMES
    assert NAMES.keys() - architecture.counted_once(NAMES, tied=True).keys() == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("name", "kind", "depth"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "q_proj", 3),
        ("h.4.attn.c_attn.bias", "c_attn.bias", 4),
        ("layers.12.mlp.experts.down_proj", "experts.down_proj", 12),
        ("embed_tokens.weight", "embed_tokens", None),
    ],
)
def test_kind_and_depth(name: str, kind: str, depth: int | None) -> None:
    assert architecture.kind_and_depth(name) == (kind, depth)


def test_names_within_the_body() -> None:
    plain = "layers.0.mlp.up_proj.weight"
    for name in (f"model.{plain}", f"model.language_model.{plain}", plain):
        assert architecture.plain_name(name, "model") == plain
    assert architecture.plain_name("transformer.h.0.mlp.c_fc.weight", "transformer") == "h.0.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("classes", "kernel", "mixes"),
    [
        (("Conv1d", "Module"), (4,), True),
        (("Conv1d", "Module"), (1,), False),
        (("GRU", "RNNBase", "Module"), None, True),
        (("Linear", "Module"), None, False),
    ],
)
def test_what_mixes_positions(classes: tuple[str, ...], kernel: Any, mixes: bool) -> None:
    assert architecture.mixes_positions(classes, kernel) is mixes


def test_caches_of_transformers_that_hold_keys_and_values() -> None:
    from transformers import cache_utils

    assert all(hasattr(cache_utils, name) for name in architecture.ATTENTION_CACHES)
    assert not architecture.holds_keys_and_values("LinearAttentionLayer")


LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 3),
        ("up_proj", 2),
        ("mlp.up_proj", 2),
        (r".*\.0\..*", 2),
        (["q_proj"], 1),
        (["up_proj", "q_proj"], 3),
        (["proj"], 0),
        (LAYERS[0], 1),
        ([], 0),
    ],
)
def test_targets(targets: str | list[str], count: int) -> None:
    assert sum(matches(targets, name) for name in LAYERS) == count


def test_targets_that_name_nothing() -> None:
    assert unmatched(["q_proj", "nowhere", "nowhere", r".*q_proj"], LAYERS) == ["nowhere", r".*q_proj"]
    assert unmatched("nowhere", LAYERS) == ["nowhere"]
    assert unmatched("all-linear", LAYERS) == []


def test_targets_that_are_no_pattern() -> None:
    with pytest.raises(ConfigError, match=r"'\*q_proj' is neither a module name nor a regular expression"):
        matches("*q_proj", LAYERS[0])
