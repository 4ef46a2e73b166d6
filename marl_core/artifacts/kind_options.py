"""Options of a PEFT config that make something of an adapter which a base with several roles can't hold, in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from marl_core.artifacts.architecture import is_output_layer
from marl_core.artifacts.kind_table import KINDS, Kind, kind_name, known_kind, tried_on

REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How init_lora_weights begins where it rewrites the base's weights."""
REWRITING_OPTIONS = ("kasa_config",)
"""Options that rewrite them whatever init_lora_weights is."""
BASE_CHANGING_OPTIONS = ("modules_to_save", "trainable_token_indices", "layer_replication")
"""Options that change modules of the base."""
_REWRITTEN = "which all roles share: the reference would no longer be the model the policy starts from"
ALORA = (
    "is an activated LoRA (aLoRA): which tokens it acts on is counted by PEFT's own forward pass; through marl's it would never act, and "
    "nothing would learn"
)
VARIANTS: Mapping[str, str] = {
    "alora_invocation_tokens": ALORA,
    "kasa_config": f"rewrites the base's weights when it is made (KaSA truncates them), {_REWRITTEN}",
    "layer_replication": "replicates the base's layers",
    "trainable_token_indices": "trains rows of the base's embeddings (single tokens)",
    "monteclora_config": (
        "is a MonteCLoRA, which draws its weights at random in training, so the ratio of old and new log-probs would be noise"
    ),
    "velora_config": (
        "is a VeLoRA, whose compressed backward pass runs in train mode only, which marl doesn't use: it would be a plain LoRA"
    ),
    "use_qalora": "is a QA-LoRA, which works on GPTQ bases only: here it would be a plain LoRA",
    "arrow_config": "is an Arrow router over other adapters",
    "megatron_config": "needs Megatron's layers",
}
"""Options of LoraConfig that make something of it that a base with several roles can't hold, and what that is."""
UNMERGEABLE_OPTIONS = (
    "layer_replication",
    "alora_invocation_tokens",
    "monteclora_config",
    "arrow_config",
    "megatron_config",
)


def config_refusal(
    peft_type: Any, options: Mapping[str, Any], key: str, *, fresh: bool = True, names: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Why an adapter of this type with these options of PEFT's can't be made on a base that all roles share, each a sentence.

    `key` is whose options they are: a key of the config (`policy.options`), or words (`adapter 'x'`). `fresh`: it is to start as the base,
    as a policy does; so what starts elsewhere is told too. `names`: which of the caller's own options stands for one of PEFT's. Options
    that PEFT doesn't know are left to PEFT.
    """
    kind = known_kind(peft_type, options)
    if kind.refused:
        yield f"{key}: {kind.refused}"
        return
    own_names = names or {}

    def at(option: str) -> str:
        name = own_names.get(option, option)
        return f"{key}.{name}" if re.fullmatch(r"[\w.\-\[\]]+", key) else f"{key}: {name}"

    yield from _initial(kind, options, key, at(kind.initial), fresh)
    bias = options.get("bias", "none")
    if bias not in ("none", False, None) and kind_name(peft_type) in KINDS:
        yield f"{at('bias')}: {bias!r} trains biases of the base, which all roles share. Use bias: none."
    for name in BASE_CHANGING_OPTIONS:
        if options.get(name):
            yield f"{at(name)}: changes modules of the base, which all roles share. Remove it."
    for name in sorted(set(VARIANTS) - set(BASE_CHANGING_OPTIONS)):
        if options.get(name) not in (None, False):  # an empty section asks for the variant too
            yield f"{at(name)}: such a LoRA {VARIANTS[name]}. Remove it."
    targets = options.get("target_modules") or ()
    for target in [targets] if isinstance(targets, str) else sorted(targets):
        if isinstance(target, str) and is_output_layer(target):
            yield f"{at('target_modules')}: {target!r} is the output layer, which marl applies itself: the adapter on it would never learn."


def how_to_ask(name: str) -> str | None:
    """How a config asks for a kind that PEFT knows by this name, or why it can't; None for a name that PEFT's kinds don't have."""
    kind = KINDS.get(kind_name(name))
    if kind is None:
        return None
    refused = next(config_refusal(name, {}, "policy"), "") if kind.refused or kind.start == "other" else ""
    return refused.removeprefix("policy: ") or f"it is a kind of PEFT's, {{use: peft, kind: {kind_name(name)}}}."


def _initial(kind: Kind, options: Mapping[str, Any], key: str, at: str, fresh: bool) -> Iterator[str]:
    """How it starts: not by rewriting the base, and, where it is fresh, as the base."""
    start = options.get(kind.initial, kind.default)
    allowed = ", ".join(str(value).lower() if value is True else str(value) for value in kind.starts)
    way_out = f"Use {' or '.join(allowed.rsplit(', ', 1))}."
    if isinstance(start, str) and start.startswith(REWRITING):
        yield f"{at}: {start!r} rewrites the base's weights, {_REWRITTEN}. {way_out}"
    elif not fresh:
        return
    elif kind.start == "other":
        yield f"{key}: {kind.title} doesn't start as the base, so step-0 KL isn't 0. Use lora, or another kind that does."
    elif start == "eva":
        yield f"{at}: 'eva' needs a pass over data, which marl doesn't make. {way_out}"
    elif start not in (None, *kind.starts):
        yield f"{at}: {'false' if start is False else repr(start)} starts away from the base: step-0 KL isn't 0. {way_out}"


def base_refusal(
    peft_type: Any,
    options: Mapping[str, Any],
    key: str,
    *,
    quantization: str | None = None,
    dtype: str = "float32",
    learns: bool = True,
) -> Iterator[str]:
    """Why an adapter of this type with these options can't stand on such a base, each a sentence.

    `quantization` is the base's (`bnb-4bit`), None where it isn't quantized; `dtype` (`float32`) what its other weights are held in;
    `learns`: the adapter is trained.
    """
    kind = known_kind(peft_type, options)
    if quantization is not None and not kind.any_quantized and quantization not in kind.packed:
        yield (
            f"{key}: quantization {quantization}: {kind.title} isn't among the kinds that were found right on it: others fail there, or "
            "take packed bytes for weights without a word. "
            f"Kinds that were: {', '.join(tried_on(quantization)) or 'none'}."
        )
    if learns and kind.follows_base and dtype != "float32":
        yield (
            f"{key}: {kind.title}: PEFT keeps it in {dtype}, in which small steps round away; use model.dtype: float32."
        )
