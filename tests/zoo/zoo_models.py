"""The zoo: one small config for every causal language model class of transformers, and why some have none.

A config is made by code: `SMALL` has a value for each size that configs name, those its class knows are taken, and
`MODELS` has what a model needs beside them. Where layers come in several kinds, each kind is there; where a window
limits attention, it is shorter than the longest row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 260
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = 10
"""Shorter than the longest rows, longer than those that marl packs to find out whether it can."""

SMALL: Mapping[str, Any] = {
    **IDS,
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "emb_dim", "dim_model_base"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim"), 8),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim", "dff"), 64
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "expert_ffn_hidden_size",
        ),
        16,
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    "first_k_dense_replace": 1,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 128),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("initializer_range", "init_std"), 0.1),
    # multi-head latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 16,  # scores of a few heads tie at zero, and ties are decided by the row's length
    "index_topk": 4,
    # state spaces and linear attention
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "n_groups": 1,
    "state_size": 8,
    "ssm_state_size": 8,
    "rotary_dim": 8,
    "use_mamba_kernels": False,
    # what sees and hears beside a text model
    "image_size": 32,
    "patch_size": 16,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "depth": 2,
    "out_hidden_size": 32,
    "hidden_size_global": 32,
    "is_decoder": True,
    # noise that some routers add in training: it must never show
    **dict.fromkeys(("router_jitter_noise", "input_jitter_noise"), 0.1),
}
"""Values by the names that configs use."""


@dataclass(frozen=True)
class Entry:
    """One model: its type, and what its config needs beside `SMALL`; a dictionary goes into the config of that name."""

    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def four_bit(self) -> bool:
        """Whether its twin in 4 bits is tried too."""
        return self.model_type in FOUR_BIT and not self.changes.get("use_sliding_window")


def _(model_type: str, **changes: Any) -> Entry:
    return Entry(model_type, changes)


FOUR_BIT = ("gemma2", "gpt_neox", "lfm2", "llama", "opt", "qwen3", "qwen3_5_text", "qwen3_moe")
"""Model types that are tried in 4 bits: each kind of layer once, where its sizes can be divisible by 64."""

SLIDING = ["sliding_attention", "full_attention"] * 2
RECURRENT = ["linear_attention", "full_attention"] * 2
LATENT = {"num_key_value_heads": 4}  # multi-head latent attention has keys of its own for every head
PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}  # embeddings of each layer
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2,
}  # fmt: skip
MULTIPLIED = {
    "logits_scaling": 4.0,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}

_ENTRIES = (
    _("axk1", **LATENT),
    _("axk2", **LATENT),
    _("bailing_hybrid", **LATENT, layer_group_size=2),
    _("blt", encoder_hash_byte_group_vocab=32),
    _("bamba", attn_layer_indices=[1, 3]),
    _("cohere_compass_text", layer_types=SLIDING, rope_parameters=dict.fromkeys(SLIDING, ROTARY)),
    _("cpmant", dim_ff=64, dim_head=8, prompt_types=4, prompt_length=4, segment_types=4),
    _(
        "dbrx",
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    _("deepseek_v2", **LATENT),
    _("deepseek_v3", **LATENT),
    _("deepseek_v32", **LATENT),
    _("dots1", layer_types=SLIDING),
    _(
        "dots3_note_text",
        **LATENT,
        head_dim=16,
        layer_types=["indexed_attention", "sliding_attention"] * 2,
        per_layer_config={},
    ),
    _("falcon_h1", mamba_d_ssm=64),
    _("fuyu"),
    _("gemma3", mm_tokens_per_image=4, text_config={"layer_types": SLIDING}, vision_config={"image_size": 64}),
    _("gemma3_text", layer_types=SLIDING),
    _("gemma3n_text", **PER_LAYER, final_logit_softcapping=3.0, num_kv_shared_layers=2, layer_types=SLIDING),
    _("gemma4", text_config={**PER_LAYER, "layer_types": SLIDING}, vision_config={"position_embedding_size": 16}),
    _("gemma4_text", **PER_LAYER, final_logit_softcapping=3.0, layer_types=SLIDING),
    _("gemma4_unified", text_config={"layer_types": SLIDING}),
    _("gemma4_unified_text", layer_types=SLIDING),
    _("glm4_moe_lite", **LATENT),
    _("glm_moe_dsa", **LATENT),
    _("gpt_neo", attention_types=[[["global", "local"], 2]]),
    _("gemma2", final_logit_softcapping=3.0, attn_logit_softcapping=3.0),
    _("granite", **MULTIPLIED),
    _("granitemoe", **MULTIPLIED),
    _("granitemoehybrid", layer_types=RECURRENT),
    _("jamba", attn_layer_period=2, attn_layer_offset=1),
    _("kimi_linear", layer_types=RECURRENT, **LATENT),
    _("lfm2", layer_types=["conv", "full_attention", "conv", "conv"], block_auto_adjust_ff_dim=False),
    _("lfm2_moe", layer_types=["conv", "full_attention", "conv", "conv"]),
    _(
        "emu3",
        vocabulary_map={"<image>": 5},
        vq_config={"base_channels": 32, "num_res_blocks": 1, "channel_multiplier": [1]},
    ),
    _("llama4", vision_config={"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32}),
    _("longcat_flash", **LATENT),
    _("mamba2", head_dim=16),
    _("minicpm3", **LATENT),
    _("laguna", layer_types=SLIDING),
    _("lfm3", layer_types=["conv", "full_attention", "conv", "sliding_attention"]),
    _("mellum", layer_types=SLIDING),
    _(
        "phi4_multimodal",
        audio_config={"nemo_conv_channels": 8, "ext_pw_out_channel": 8, "depthwise_separable_out_channel": 8},
    ),
    _("qwen4_exp", text_config=INDEXER),
    _("qwen4_exp_text", **INDEXER),
    _("reformer", axial_pos_embds=False, attention_head_size=8, feed_forward_size=64),
    _("roc_bert", pronunciation_embed_dim=8, shape_embed_dim=8, pronunciation_vocab_size=32, shape_vocab_size=32),
    _("xlstm", hidden_size=128),
    _("xmod", languages=["en_XX"], default_language="en_XX"),
    _("xlm", causal=True),
    _("youtu", **LATENT),
    _(
        "zamba",
        attention_head_dim=16,
        num_key_value_heads=4,
        num_hidden_layers=5,
        layers_block_type=["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
    ),
    _(
        "zamba2",
        num_key_value_heads=4,
        num_hidden_layers=5,
        layers_block_type=["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
    ),
    _("zaya", num_experts_per_tok=1, layer_types=["hybrid", "hybrid_sliding"] * 2),
)
VARIANTS: Mapping[str, Entry] = {
    "bert without is_decoder": _("bert", is_decoder=False),
    "roberta without is_decoder": _("roberta", is_decoder=False),
    "xlm without causal": _("xlm"),
    "falcon with alibi": _("falcon", alibi=True),
    "falcon of the new kind": _("falcon", new_decoder_architecture=True),
    "gpt_neox without parallel residual": _("gpt_neox", use_parallel_residual=False),
    "mpt without alibi": _("mpt", attn_config={"alibi": False}),
    "opt after the norm": _("opt", do_layer_norm_before=False, word_embed_proj_dim=16),
    "lfm2 with small weights": _(
        "lfm2",
        layer_types=["conv", "full_attention", "conv", "conv"],
        block_auto_adjust_ff_dim=False,
        initializer_range=0.04,
    ),
    "qwen2 with windows": _("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3 with windows": _("qwen3", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
}
"""Kinds of one class that differ in what matters here."""

_DRAFTER = "a drafter: it reads another model's hidden states and is no language model by itself"
_AUDIO_CODES = "AutoModelForCausalLM can't build it: its class wants the config of the decoder inside"
LEFT_OUT: Mapping[str, str] = {
    "dots3_note": "the same text model as dots3_note_text",
    "gemma3n": "needs timm; its text model is gemma3n_text",
    "gemma4_assistant": _DRAFTER,
    "gemma4_unified_assistant": _DRAFTER,
    "musicgen": _AUDIO_CODES,
    "musicgen_melody": _AUDIO_CODES,
}


def models() -> dict[str, Entry]:
    """Every model by its name: all that transformers knows but for `LEFT_OUT`, and the variants."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    special = {entry.model_type: entry for entry in _ENTRIES}
    found = {kind: special.get(kind, Entry(kind)) for kind in CLASSES if kind not in LEFT_OUT}
    return dict(sorted({**found, **VARIANTS}.items()))


def small_config(entry: Entry, sizes: Mapping[str, Any] | None = None) -> Any:
    """The config of an entry; `sizes` stand for those of `SMALL`."""
    from transformers import CONFIG_MAPPING

    return _small(CONFIG_MAPPING[entry.model_type], entry.changes, {**SMALL, **(sizes or {})})


def _small(kind: Any, changes: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
    """A config of class `kind` with the sizes that it knows and the changes, its parts likewise."""
    usual = kind()
    known = set(getattr(kind, "__dataclass_fields__", {})) | set(usual.to_dict())
    values = {name: value for name, value in sizes.items() if name in known}
    parts = {name: type(getattr(usual, name)) for name in kind.sub_configs if hasattr(usual, name)}
    for name, part in parts.items():
        if hasattr(part, "sub_configs"):
            values[name] = _small(part, changes.get(name, {}), sizes)
    return kind(**{**values, **{name: value for name, value in changes.items() if name not in parts}})
