"""What architectures call their sizes and weights: the one place that knows, asked with a config.json and with names alone.

transformers holds some two hundred causal models, and each may call its width, its layers or its embedding as it likes. Whatever follows
from such a name is answered here, without torch and without weights. What a name can't tell (whether rows may be packed, whether a
layer can be adapted) is measured on the loaded model instead (bank/measure.py, bank/targets.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeGuard

Shapes = Mapping[str, tuple[int, ...]]

# -- sizes: what a config.json says -------------------------------------------------------------------------------------

HIDDEN_SIZE_KEYS = ("hidden_size", "n_embd", "d_model")
LAST_WIDTH_KEYS = ("word_embed_proj_dim", *HIDDEN_SIZE_KEYS, "embedding_size")
"""Keys that may name the width of the last hidden states; the first of them where a model projects at its end."""
LAYERS_KEYS = ("num_hidden_layers", "n_layer")
HEADS_KEYS = ("num_attention_heads", "n_head")
FEED_FORWARD_KEYS = ("intermediate_size", "n_inner", "ffn_dim")
POSITIONS_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
ROTARY_KEYS = ("rope_parameters", "rope_scaling")
UNBOUNDED_POSITIONS = 2**31
"""A number of positions from here on is a config's way to say that there is no bound."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes of a causal language model, as its config.json names them; 0 or None where it doesn't say."""

    model_type: str | None
    hidden_size: int
    last_widths: tuple[int, ...]
    """What the width of the last hidden states can be: several where the config names several sizes."""
    layers: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    positions: int | None
    """Most tokens of one sequence; None without a bound. A rotary model that was stretched has its original number times the factor."""
    tied: bool
    """Whether the output layer is the embedding's own weight."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """From a config.json; of a model that also sees or hears, from its text part."""
        text = text_config(config)
        hidden, heads = _size(text, HIDDEN_SIZE_KEYS), _size(text, HEADS_KEYS)
        widths = (text.get(key) for key in LAST_WIDTH_KEYS)
        kind = config.get("model_type")
        return cls(
            model_type=kind if isinstance(kind, str) else None,
            hidden_size=hidden,
            last_widths=tuple(dict.fromkeys(width for width in widths if _is_size(width))),
            layers=_size(text, LAYERS_KEYS),
            attention_heads=heads,
            key_value_heads=_size(text, ("num_key_value_heads",)) or heads,
            head_dim=_size(text, ("head_dim",)) or hidden // max(heads, 1),
            feed_forward=_size(text, FEED_FORWARD_KEYS) or 4 * hidden,
            vocabulary=_size(text, ("vocab_size",)),
            positions=positions(text),
            tied=bool(text.get("tie_word_embeddings")),
        )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the part that text goes through, laid over what stands beside it; the config itself in most models."""
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, Mapping) else config


def named_positions(config: Mapping[str, Any]) -> int | None:
    """The number of positions that a config names, whatever was stretched since; None where it names no bound."""
    named = (config.get(key) for key in POSITIONS_KEYS)
    return next((int(value) for value in named if _is_number(value) and 0 < value < UNBOUNDED_POSITIONS), None)


def positions(config: Mapping[str, Any]) -> int | None:
    """Most tokens of one sequence by a text config; None where it names no bound."""
    named = named_positions(config)
    if named is None:
        return None
    rotary = next((config[key] for key in ROTARY_KEYS if config.get(key)), None)
    stretch = rotary if isinstance(rotary, Mapping) else {}
    original, factor = stretch.get("original_max_position_embeddings"), stretch.get("factor")
    stretched = int(original * factor) if _is_number(original) and _is_number(factor) else 0
    return max(named, stretched)


def window(config: Mapping[str, Any]) -> int:
    """Tokens that every layer sees at least, by a text config: the smallest sliding window or chunk; 2**62 without one."""
    sizes = (
        value
        for key, value in config.items()
        if ("window" in key or "chunk" in key) and not key.endswith(("layers", "pattern"))
    )
    return min((size for size in sizes if _is_size(size) and size > 0), default=2**62)


def special_tokens(config: Mapping[str, Any]) -> set[int]:
    """Ids of tokens that mean something to a model beside their embedding: ends, padding, places of pictures."""
    tokens: set[int] = set()
    for key, value in config.items():
        if key.endswith(("token_id", "token_index", "token_ids")):
            ids = value if isinstance(value, list | tuple) else [value]
            tokens |= {int(token) for token in ids if token is not None}
    return tokens


def _size(config: Mapping[str, Any], keys: Iterable[str]) -> int:
    return next((config[key] for key in keys if _is_size(config.get(key))), 0)


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


# -- weights: what their names say --------------------------------------------------------------------------------------

EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "word_embeddings", "tok_embeddings", "embedding", "embeddings", "wpe")
"""Last parts of the names of embeddings."""
OUTPUT_LAYERS = ("lm_head", "embed_out", "output_layer", "output_embeddings")
"""Last parts of the names of layers that give logits."""
POSITION_TABLES = ("wpe",)
"""Embeddings of positions, beside those that have `pos` in their name."""
LAYER_LISTS = (".layers.", ".h.", ".blocks.")
"""Parts of the names of weights inside decoder layers. Fingerprints of the first version depend on this list: a further entry would
change them."""


def leaf(name: str) -> str:
    """The last part of a weight's or a layer's name: `model.layers.0.mlp.up_proj.weight` -> `up_proj`."""
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


def leaves(names: Iterable[str]) -> list[str]:
    """The last parts of layers' names, each once, sorted."""
    return sorted({name.rpartition(".")[2] for name in names})


def is_embedding(name: str) -> bool:
    """Whether a name's last part is that of an embedding, of tokens or of positions."""
    return leaf(name) in EMBEDDINGS


def is_output_layer(name: str) -> bool:
    """Whether a name's last part is that of the layer that gives logits."""
    return leaf(name) in OUTPUT_LAYERS


def is_position_table(name: str) -> bool:
    """Whether a name's last part is that of an embedding of positions."""
    return leaf(name) in POSITION_TABLES or "pos" in leaf(name)


def token_rows(shapes: Shapes) -> dict[str, int]:
    """Rows of the embedding and of the output layer, one for each token, by the weight's name."""
    return {
        name: shape[0]
        for name, shape in shapes.items()
        if len(shape) == 2 and (is_embedding(name) or is_output_layer(name)) and not is_position_table(name)
    }


def linear_layers(shapes: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the linear layers that an adapter can adapt: neither embeddings nor the output layer."""
    for name, shape in shapes.items():
        if name.endswith(".weight") and len(shape) == 2 and not _is_at_an_end(name):
            yield name.removesuffix(".weight"), shape


def _is_at_an_end(name: str) -> bool:
    """Whether a weight belongs to what tokens become first or last, whatever part of its name says so."""
    parts = name.split(".")
    return any("embed" in part or "lm_head" in part or part in (*EMBEDDINGS, *OUTPUT_LAYERS) for part in parts)


def counted_once(shapes: Shapes, tied: bool) -> dict[str, tuple[int, ...]]:
    """All shapes, without an output layer that is the embedding's own weight where they are `tied`."""
    return {name: shape for name, shape in shapes.items() if not (tied and name == "lm_head.weight")}


def plain_name(name: str, prefix: str) -> str:
    """A weight's name within the body, in a model's own class and in one that holds it as its language model.

    `prefix` is what the class calls its body (transformers' base_model_prefix).
    """
    return name.removeprefix(f"{prefix}.").removeprefix("language_model.").removeprefix("model.")


def is_in_a_layer(name: str) -> bool:
    """Whether a weight stands in a decoder layer, by the first version of fingerprints."""
    return any(part in name for part in LAYER_LISTS)


def kind_and_depth(name: str) -> tuple[str, int | None]:
    """What kind of weight a name is of, and in which layer: (`q_proj`, 3); None for what stands in no layer.

    A bias is a kind of its own (`c_attn.bias`), and so are the experts' weights (`experts.down_proj`).
    """
    parts = name.removesuffix(".weight").split(".")
    depth = next((int(part) for part in parts if part.isdigit()), None)
    two_parts = parts[-1] == "bias" or "experts" in parts[-2:-1]
    return ".".join(parts[-2:]) if two_parts else parts[-1], depth


def chooses_experts(modules: Iterable[str]) -> bool:
    """Whether a model sends tokens to experts, by the names of its modules."""
    return any("expert" in name.lower() for name in modules)


# -- what mixes positions besides attention -----------------------------------------------------------------------------

MIXING_MODULES = ("Conv1d", "RNNBase")
"""torch's classes of modules whose output at one position depends on others."""
ATTENTION_CACHES = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""transformers' classes of a layer's cache that holds keys and values. Another one holds a state, of linear attention for one."""


def mixes_positions(classes: Iterable[str], kernel_size: Any) -> bool:
    """Whether a module mixes positions, by the names of its classes, base classes included, and its kernel's size if it has one."""
    return bool(set(classes) & set(MIXING_MODULES)) and kernel_size not in (1, (1,))


def holds_keys_and_values(cache_layer: str) -> bool:
    """Whether a layer's cache holds keys and values alone, by the name of its class."""
    return cache_layer in ATTENTION_CACHES


# -- single model types -------------------------------------------------------------------------------------------------

POOLED_CLASSIFIERS = ("bert", "ernie", "megatron-bert", "rembert", "roc_bert", "modernbert-decoder")
"""Model types that have a causal model and a classifier whose one linear head doesn't read the last token's hidden state."""

CONVERTED_EXPERTS = frozenset(
    [
        "mixtral",
        "minimax",
        "minimax_m2",
        "qwen2_moe",
        "afmoe",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "ernie4_5_moe",
        "glm4_moe",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "glm4v_moe",
        "longcat_flash",
        "solar_open",
        "mellum",
        "qwen3_moe",
        "qwen3_omni_moe",
        "qwen3_omni_moe_thinker",
        "qwen3_omni_moe_text",
        "qwen3_next",
        "hunyuan_v1_moe",
        "flex_olmo",
        "olmoe",
        "exaone_moe",
        "cohere2_moe",
    ]
)
"""Model types whose experts' LoRA peft converts; a test compares with its own tables."""
HALVES_OF_ONE_TENSOR = (("gate_proj", "up_proj"), ("w1", "w3"))
"""Experts' layers that transformers 5 keeps as one tensor: whoever adapts one adapts both."""
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.([^.]+)\.(?!(weight|bias)$)")


def layer_of_one_expert(name: str) -> str | None:
    """Which layer of a single expert an adapter's tensor is for (`up_proj`), as transformers 4 kept experts; None for any other tensor."""
    match = _ONE_EXPERT.search(name)
    return match[1] if match else None


# -- weights as files store them, and as transformers holds them --------------------------------------------------------

TRANSPOSED_TYPES = ("gpt2", "openai-gpt")
"""Model types whose linear layers are transformers' Conv1D, which hold [in, out]."""
ROUTERS = ("gate", "router")
"""Last parts of the names of routers, beside the experts that they choose from."""
_EXPERTS_LAYER = re.compile(r"^(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<layer>[^.]+)\.weight$")


def as_held(shapes: Shapes, model_type: str | None) -> dict[str, tuple[int, ...]]:
    """Shapes of files as the loaded model has them: experts that are stored one by one are one tensor for all.

    Two halves become [experts, 2 feed-forward, hidden], the layer behind them [experts, hidden, feed-forward].
    """
    if model_type not in CONVERTED_EXPERTS:
        return dict(shapes)
    held: dict[str, tuple[int, ...]] = {}
    counts: dict[tuple[str, str], tuple[int, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        match = _EXPERTS_LAYER.match(name)
        if match is None:
            held[name] = shape
        else:
            place = (match["experts"], match["layer"])
            counts[place] = (counts.get(place, (0, shape))[0] + 1, shape)
    halves = {layer: pair for pair in HALVES_OF_ONE_TENSOR for layer in pair}
    for (experts, layer), (count, shape) in counts.items():
        rows = 2 * shape[0] if layer in halves else shape[0]
        held[f"{experts}.{'gate_up_proj' if layer in halves else 'down_proj'}"] = (count, rows, *shape[1:])
    return held


def adaptable_layers(shapes: Shapes, model_type: str | None) -> dict[str, tuple[int, int]]:
    """The linear layers, (out, in) of each by its name: without routers of experts, which give a choice and no plain tensor.

    `shapes` as the loaded model has them (`as_held`).
    """
    routed = {name.partition(".experts.")[0] for name in shapes if ".experts." in name}
    found: dict[str, tuple[int, int]] = {}
    for name, shape in linear_layers(shapes):
        if name.rpartition(".")[0] in routed and leaf(name) in ROUTERS:
            continue
        rows, columns = shape
        found[name] = (columns, rows) if model_type in TRANSPOSED_TYPES else (rows, columns)
    return found
