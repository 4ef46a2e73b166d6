"""What an adapter's config and its tensors' names say that a shared base, or a merge, can't take: found without weights.

`marl check` and whoever loads or merges an adapter ask here, so that both say the same. Where neither refuses, the adapter's
numbers are those of plain peft.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from marl_core.artifacts.adapter_files import (
    CONFIG_FILE,
    PEFT_PREFIX,
    SHARED_PARTS,
    VALUE_HEAD_FILE,
    VALUE_HEAD_PICKLE,
    AdapterFiles,
    part_of,
)
from marl_core.artifacts.architecture import is_embedding, is_output_layer, leaf
from marl_core.artifacts.kind_options import ALORA as ALORA
from marl_core.artifacts.kind_options import REWRITING as REWRITING
from marl_core.artifacts.kind_options import REWRITING_OPTIONS as REWRITING_OPTIONS
from marl_core.artifacts.kind_options import UNMERGEABLE_OPTIONS as UNMERGEABLE_OPTIONS
from marl_core.artifacts.kind_options import VARIANTS as VARIANTS
from marl_core.artifacts.kind_options import base_refusal as base_refusal
from marl_core.artifacts.kind_options import config_refusal as config_refusal
from marl_core.artifacts.kind_table import KINDS as KINDS
from marl_core.artifacts.kind_table import Kind as Kind
from marl_core.artifacts.kind_table import kind_name as kind_name
from marl_core.artifacts.kind_table import known_kind as known_kind
from marl_core.errors import MERGE, in_words

Use = Literal["shared", "merged"]
"""`shared`: it stands on the base that all roles share. `merged`: it is merged into a base of its own."""

PLAIN_LORA_HINT = "Train a plain LoRA (DoRA, rsLoRA and other kinds of docs/adapters.md are held too)"
_ODD_PREFIXES = re.compile(r"^(base_model\.model\.)?(_orig_mod|module|pretrained_model|base_model\.model)\.")
"""What wrappers put before a name, inside of peft's own or outside."""


def refusals(files: AdapterFiles, use: Use) -> list[str]:
    """Why this adapter can't be used so, each a sentence that begins with its folder; empty when it can."""
    wrong = _kind(files, use)
    if wrong is not None:
        return [f"{files.folder} {wrong}"]
    return [f"{files.folder} {sentence}" for sentence in (*_options(files, use), *_tensors(files, use))]


def _kind(files: AdapterFiles, use: Use) -> str | None:
    """Why an adapter of this kind can't be used so, whatever its options are."""
    named, kind = files.config.get("peft_type"), files.kind
    if not kind_name(named):
        return f"doesn't say what kind of adapter it is (peft_type in its {CONFIG_FILE}). Save it again with PEFT's save_pretrained."
    if use == "shared" and kind.refused:
        return f"is a {named} adapter. {kind.refused}"
    if use == "merged" and kind.base_dependent and kind.refused:
        return f"is a {named} adapter. {kind.refused}"
    if use == "merged" and kind.merge == "no" and kind.refused:
        return f"is a {named} adapter, which PEFT can't merge. {kind.refused}"
    return None


def not_a_policy(files: AdapterFiles) -> str | None:
    """Why an adapter can't be continued as a policy, a sentence that begins with its folder; None when it can."""
    if not files.score_keys:
        return None
    return f"{files.folder} is a reward adapter (it has a score head), not a policy to continue."


def saved_modules(files: AdapterFiles) -> dict[str, tuple[int, ...]]:
    """Whole weights in the file, neither the adapter's own parts nor a score head's: shape by name without PEFT's prefix."""
    heads = {name for name in files.shapes if name in files.score_keys or ".original_module." in name}
    return {
        name.removeprefix(PEFT_PREFIX): shape
        for name, shape in files.shapes.items()
        if name not in heads and files.part(name) is None and not _is_value_head(name)
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
    single = (
        files.config.get("trainable_token_indices") or kind_name(files.config.get("peft_type")) == "trainable_tokens"
    )
    return bool(single) or bool(saved_embeddings(files))


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
    if use == "shared" and kind_name(config.get("peft_type")) == "adalora" and config.get("rank_pattern"):
        yield (
            "is an AdaLoRA whose ranks were moved between its layers (rank_pattern in its adapter_config.json), and the bank holds AdaLoRA "
            f"at one rank. {_way_out(files)}"
        )
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
        yield f"brings whole weights of {_list_modules(saved)} beside its own, which all roles would share. {_way_out(files)}"
    layers = {leaf(_unwrapped(layer)) for layer in map(files.adapted_layer, files.shapes) if layer}
    adapted = sorted(layer for layer in layers if is_output_layer(layer))
    if adapted:
        yield (
            f"adapts the output layer ({', '.join(adapted)}), whose own weight all roles read their log-probs from: what it learned "
            f"there would be lost. {_way_out(files)}"
        )


def _names(files: AdapterFiles) -> Iterator[str]:
    """Files that peft itself would load without a word and without a tensor."""
    names = sorted(files.shapes)
    own = [name for name in names if (part := files.part(name)) and part["layer"]]
    bad = [name for name in own if 0 in files.shapes[name] or _too_flat(name, files.shapes[name])]
    if bad:
        yield (
            f"holds {len(bad)} tensors of the adapter without their numbers (first: {bad[0]} is {list(files.shapes[bad[0]])}): DeepSpeed "
            "ZeRO-3 or FSDP saved one process's share. Gather the weights (DeepSpeed: stage3_gather_16bit_weights_on_model_save, or "
            "zero_to_fp32.py) and save the adapter again."
        )
    others = sorted({kind.title for kind in KINDS.values() for name in names if part_of(kind.parts, name)})
    if not any(map(files.part, names)) and others:
        yield (
            f"says that it is a {files.kind.title} adapter, and its file holds tensors of another kind ({', '.join(others)}): config and "
            "weights belong to different adapters. Copy the whole folder."
        )
    value_heads = [name for name in names if _is_value_head(name)]
    if value_heads:
        yield (
            f"holds a value head among its tensors (first: {value_heads[0]}), which peft drops without a word. Save the head beside it, "
            f"as {VALUE_HEAD_FILE}, if it is a reward adapter; take it out if the head isn't needed."
        )
    odd = [name for name in own if _is_oddly_named(files, name)]
    if odd:
        yield (
            f"names its tensors in a way that peft doesn't read (first of {len(odd)}: {odd[0]}); peft writes {PEFT_PREFIX} and the layer's "
            "name in the model. Unwrap the model before it is saved (torch.compile, DataParallel and value-head wrappers add prefixes), "
            "or rename the tensors with safetensors."
        )
    parts = [] if files.kind.inner else [part for part in map(files.part, own) if part]
    named = sorted({inner for inner in map(_name_inside, parts) if inner not in (None, "default")})
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


def _too_flat(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a LoRA's matrix has one dimension, as a shard has."""
    return len(shape) < 2 and re.search(r"\.lora_[AB]\.(.+\.)?weight$", name) is not None


def _is_oddly_named(files: AdapterFiles, name: str) -> bool:
    """Whether peft wouldn't look for a tensor of the adapter under this name."""
    part = files.part(name)
    if part and part["layer"] == SHARED_PARTS:
        return False
    return not name.startswith(PEFT_PREFIX) or _ODD_PREFIXES.match(name.removeprefix(PEFT_PREFIX)) is not None


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
