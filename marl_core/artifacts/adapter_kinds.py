"""What an adapter's config and its tensors' names say that a shared base, or a merge, can't take: found without weights.

`marl check` and whoever loads or merges an adapter ask here, so that both say the same. Where neither refuses, the adapter's
numbers are those of plain peft.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from marl_core.artifacts.adapter_files import PEFT_PREFIX, VALUE_HEAD_FILE, VALUE_HEAD_PICKLE, AdapterFiles
from marl_core.artifacts.architecture import is_embedding, is_output_layer, leaf
from marl_core.errors import MERGE, in_words

Use = Literal["shared", "merged"]
"""`shared`: it stands on the base that all roles share. `merged`: it is merged into a base of its own."""

REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How init_lora_weights begins where it rewrites the base's weights."""
REWRITING_OPTIONS = ("kasa_config",)
"""Options that rewrite them whatever init_lora_weights is."""
ALORA = (
    "is an activated LoRA (aLoRA): it acts after its invocation tokens alone, and only a pass that looks for them in each row tells "
    "its layers where they are"
)
VARIANTS: Mapping[str, str] = {
    "alora_invocation_tokens": ALORA,
    "kasa_config": "rewrites the base's weights when it is made (KaSA truncates them)",
    "layer_replication": "replicates the base's layers",
    "trainable_token_indices": "trains rows of the base's embeddings (single tokens)",
    "monteclora_config": "is a MonteCLoRA, which draws its weights at random while it is trained",
    "velora_config": "is a VeLoRA, which computes other gradients in train mode, and marl trains in one mode for all passes",
    "use_qalora": "is a QA-LoRA, which is made for GPTQ weights",
    "arrow_config": "is an Arrow router over other adapters",
    "megatron_config": "needs Megatron's layers",
}
"""Options of LoraConfig that make something of it that a base with several roles can't hold, and what that is."""
UNMERGEABLE_OPTIONS = ("alora_invocation_tokens", "monteclora_config", "arrow_config", "megatron_config")
PLAIN_LORA_HINT = "Train a plain LoRA (DoRA, rsLoRA and LoRA with bias are held too)"
_PART = re.compile(r"^(?P<layer>.+?)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.(?P<rest>.+))?$")
_ODD_PREFIXES = re.compile(r"^(base_model\.model\.)?(_orig_mod|module|pretrained_model|base_model\.model)\.")
"""What wrappers put before a name, inside of peft's own or outside."""


def refusals(files: AdapterFiles, use: Use) -> list[str]:
    """Why this adapter can't be used so, each a sentence that begins with its folder; empty when it can."""
    kind = files.config.get("peft_type")
    if kind != "LORA":
        return [
            f"{files.folder} is a {kind} adapter; marl's bank holds LoRA adapters. Merge it with peft itself (merge_and_unload, where its "
            "kind can be merged) and give the merged model as model.path, or train a LoRA."
        ]
    return [f"{files.folder} {sentence}" for sentence in (*_options(files, use), *_tensors(files, use))]


def saved_modules(files: AdapterFiles) -> dict[str, tuple[int, ...]]:
    """Whole weights in the file, neither a LoRA's nor a score head's: shape by name without PEFT's prefix."""
    heads = {name for name in files.shapes if name in files.score_keys or ".original_module." in name}
    return {
        name.removeprefix(PEFT_PREFIX): shape
        for name, shape in files.shapes.items()
        if name not in heads and not re.search(r"(^|\.)lora_", name) and not _is_value_head(name)
    }


def saved_embeddings(files: AdapterFiles) -> dict[str, tuple[int, ...]]:
    """Those of them that are the embedding or the output layer."""
    modules = {name: shape for name, shape in saved_modules(files).items() if "trainable_tokens" not in name}
    return {
        name: shape
        for name, shape in modules.items()
        if is_embedding(_unwrapped(name)) or is_output_layer(_unwrapped(name))
    }


def brings_tokens(files: AdapterFiles) -> bool:
    """Whether the adapter changes what tokens mean, so that its own tokenizer belongs to it."""
    return bool(saved_embeddings(files)) or bool(files.config.get("trainable_token_indices"))


def head_beside(files: AdapterFiles) -> str | None:
    """The file of a value head that lies beside the adapter, LLaMA-Factory's way."""
    present = (name for name in (VALUE_HEAD_FILE, VALUE_HEAD_PICKLE) if (files.folder / name).is_file())
    return next(present, None)


def target_parameters(config: Mapping[str, Any]) -> frozenset[str]:
    """The weights that a LoRA adapts directly, experts that are one tensor for all."""
    targets = config.get("target_parameters")
    return frozenset(map(str, targets)) if isinstance(targets, list | tuple | set | frozenset) else frozenset()


def _options(files: AdapterFiles, use: Use) -> Iterator[str]:
    config = files.config
    bias = config.get("bias", "none")
    if bias != "none" and use == "shared":
        yield (
            f"was trained with bias: {bias!r}, which changes the base's own biases, and all roles share the base. "
            f"{_way_out(files)}"
        )
    for option, what in VARIANTS.items():
        if not config.get(option) or (use == "merged" and option not in UNMERGEABLE_OPTIONS):
            continue
        advice = _way_out(files) if option not in UNMERGEABLE_OPTIONS else f"{PLAIN_LORA_HINT}."
        yield f"{what} ({option} in its adapter_config.json). {advice}"
    start = config.get("init_lora_weights")
    if use == "shared" and isinstance(start, str) and start.startswith(REWRITING):
        yield (
            f"has init_lora_weights {start!r}, which rewrites the base's weights when it is loaded, and all roles share the base. "
            "Convert it to a plain LoRA (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)), or merge it "
            f"(reference: merged-base, {in_words(*MERGE)})."
        )


def _tensors(files: AdapterFiles, use: Use) -> Iterator[str]:
    yield from _names(files)
    if use == "merged":
        yield from _lost_heads(files)
        return
    saved = saved_modules(files)
    if saved and not files.config.get("trainable_token_indices") and files.config.get("bias", "none") == "none":
        yield f"brings whole weights of {_list_modules(saved)} beside its LoRA, which all roles would share. {_way_out(files)}"
    layers = {leaf(_unwrapped(match["layer"])) for match in _parts(files)}
    adapted = sorted(layer for layer in layers if is_output_layer(layer))
    if adapted:
        yield (
            f"adapts the output layer ({', '.join(adapted)}), whose own weight all roles read their log-probs from: the LoRA on it would "
            f"be lost. {_way_out(files)}"
        )


def _names(files: AdapterFiles) -> Iterator[str]:
    """Files that peft itself would load without a word and without a tensor."""
    names = sorted(files.shapes)
    empty = [name for name in names if ".lora_" in name and 0 in files.shapes[name]]
    one_dimensional = [
        name for name in names if re.search(r"\.lora_[AB]\.(.+\.)?weight$", name) and len(files.shapes[name]) < 2
    ]
    if empty or one_dimensional:
        bad = [*empty, *one_dimensional]
        yield (
            f"holds {len(bad)} LoRA tensors without their numbers (first: {bad[0]} is {list(files.shapes[bad[0]])}): DeepSpeed ZeRO-3 or "
            "FSDP saved one process's share. Gather the weights (DeepSpeed: stage3_gather_16bit_weights_on_model_save, or "
            "zero_to_fp32.py) and save the adapter again."
        )
    value_heads = [name for name in names if _is_value_head(name)]
    if value_heads:
        yield (
            f"holds a value head among its tensors (first: {value_heads[0]}), which peft drops without a word. Save the head beside it, "
            f"as {VALUE_HEAD_FILE}, if it is a reward adapter; take it out if the head isn't needed."
        )
    lora = [name for name in names if ".lora_" in name]
    odd = [
        name for name in lora if not name.startswith(PEFT_PREFIX) or _ODD_PREFIXES.match(name.removeprefix(PEFT_PREFIX))
    ]
    if odd:
        yield (
            f"names its tensors in a way that peft doesn't read (first of {len(odd)}: {odd[0]}); peft writes {PEFT_PREFIX} and the layer's "
            "name in the model. Unwrap the model before it is saved (torch.compile, DataParallel and value-head wrappers add prefixes), "
            "or rename the tensors with safetensors."
        )
    named = sorted({inner for inner in map(_name_inside, _parts(files)) if inner not in (None, "default")})
    if named:
        yield (
            f"keeps an adapter's name in its tensors' names ({', '.join(map(repr, named))}): peft leaves such tensors out without a "
            "word. Save it with PEFT's save_pretrained, or take the name out of the tensors' names."
        )


def _lost_heads(files: AdapterFiles) -> Iterator[str]:
    if files.score_keys:
        yield "is a reward adapter (it has a score head); merging it would lose the head. Name it in reward.path instead."
    head_file = head_beside(files)
    if head_file is not None:
        yield (
            f"has a value head beside it ({head_file}, as LLaMA-Factory saves reward adapters); merging it would lose the head. Name it in "
            "reward.path if it is a reward adapter, or take that file away if the head isn't needed."
        )


def _way_out(files: AdapterFiles) -> str:
    if files.score_keys or files.value_head:
        return "Train the reward adapter again without it."
    return f"Merge it into a base of its own first: {how_to_merge(files)}, then model.path: NEW."


def how_to_merge(files: AdapterFiles) -> str:
    """The command, or in Python the call, that merges an adapter into a base of its own."""
    return in_words(
        f"{MERGE[0]} --model BASE --adapter {files.folder} --out NEW", f"{MERGE[1]}(BASE, {str(files.folder)!r}, NEW)"
    )


def _list_modules(saved: Iterable[str]) -> str:
    names = sorted({name.removesuffix(".weight").removesuffix(".bias") for name in saved})
    kinds = {"embeddings": is_embedding, "output layer": is_output_layer}
    kinds_present = [kind for kind, is_one in kinds.items() if any(is_one(_unwrapped(name)) for name in names)]
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return (
        f"{listed} ({', '.join(kinds_present)}; saved embeddings, added tokens)"
        if kinds_present
        else f"{listed} (modules_to_save)"
    )


def _parts(files: AdapterFiles) -> Iterator[re.Match[str]]:
    return (match for match in map(_PART.match, files.shapes) if match)


def _name_inside(match: re.Match[str]) -> str | None:
    """The adapter's name that stands in a tensor's name, where PEFT's files have none."""
    rest = match["rest"]
    pieces = rest.split(".") if rest else []
    if pieces and pieces[-1] in ("weight", "bias"):
        pieces = pieces[:-1]
    return ".".join(pieces) or None


def _unwrapped(name: str) -> str:
    """A tensor's name without what PEFT's wrappers put into it."""
    return re.sub(r"\.(base_layer|token_adapter|modules_to_save|trainable_tokens_delta|default)\b", "", name)


def _is_value_head(name: str) -> bool:
    return "v_head." in name
