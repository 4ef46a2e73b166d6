"""What headers alone tell about fit: LoRA targets that exist, adapters and heads of this base's shape, stop tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from marl_core.artifacts.adapter_files import AdapterFiles, read_adapter
from marl_core.artifacts.adapter_kinds import target_parameters
from marl_core.artifacts.architecture import (
    POOLED_CLASSIFIERS,
    Architecture,
    Shapes,
    is_embedding,
    leaves,
    linear_layers,
)
from marl_core.artifacts.lora_targets import ALL_LINEAR, unmatched
from marl_core.artifacts.model_files import ModelFiles
from marl_core.config.adapter_config import AdapterSection
from marl_core.config.run_config import RunConfig
from marl_core.errors import ConfigError, DataError, MarlError, near_match
from marl_core.plan.adapter_checks import named_adapters
from marl_core.plan.chosen import Chosen

STOPS_NAMED = 8
"""Special tokens that a message lists."""


def fit_findings(plan: Chosen, files: ModelFiles) -> Iterator[MarlError]:
    """Reasons why adapters, targets or stop tokens don't fit the model in `files`. Nothing but headers is read."""
    try:
        shapes = dict(linear_layers(files.shapes()))
    except DataError:
        return  # damaged or missing weights are told elsewhere; a hub name's cache may hold none
    for key, (section, _) in plan.adapter_strategies.items():
        yield from _targets(section, key, shapes)
    for key, path, _ in named_adapters(plan):
        try:
            adapter = read_adapter(path, key)
        except DataError:
            continue  # told by whoever names it
        yield from _fits(adapter, key, shapes)
        yield from _head_fits(adapter, key, files)
    yield from _stops(plan.config, files)


def _targets(section: AdapterSection, key: str, shapes: Shapes) -> Iterator[MarlError]:
    """Each module that an adapter's targets name must be there."""
    try:
        unmatched_targets = unmatched(section.targets, shapes) if section.targets != ALL_LINEAR else []
    except ConfigError as error:
        yield ConfigError(f"{key}.targets: {error}")
        return
    if unmatched_targets:
        yield ConfigError(
            f"{key}.targets: {', '.join(map(repr, unmatched_targets))}: no such layer in this model; it has {', '.join(leaves(shapes))}."
        )


def _fits(adapter: AdapterFiles, key: str, shapes: Shapes) -> Iterator[MarlError]:
    """At least one of the layers is there, and of a LoRA each has its shape.

    lora_A is [r, in] and lora_B [out, r] of a layer [out, in]; names may differ by the model's own prefix. What other kinds' shapes say of
    a layer depends on their options, so that is left to whoever loads them.
    """
    adapted = leaves(layer for layer in map(adapter.adapted_layer, adapter.shapes) if layer)
    if (
        adapted
        and adapter.kind.linear
        and not set(adapted) & set(leaves(shapes))
        and not target_parameters(adapter.config)
        and not any(is_embedding(layer) for layer in adapted)
    ):
        yield DataError(
            f"{key}: {adapter.folder} adapts layers ({', '.join(adapted)}) of which this model has none; it has "
            f"{', '.join(leaves(shapes))}. It says it was trained on {adapter.base_name!r}: use that base, or another adapter."
        )
        return
    for name, lora_shape in adapter.shapes.items():
        part = adapter.part(name)
        factor, layer_path = (part["part"], adapter.adapted_layer(name)) if part else ("", None)
        if factor not in ("lora_A", "lora_B") or layer_path is None:
            continue
        layer_shape = shapes.get(layer_path) or next(
            (
                shape
                for layer_name, shape in shapes.items()
                if layer_name.endswith("." + layer_path) or layer_path.endswith("." + layer_name)
            ),
            None,
        )
        if layer_shape is None or len(lora_shape) != 2:
            continue
        axis, size = (1, layer_shape[1]) if factor == "lora_A" else (0, layer_shape[0])
        if lora_shape[axis] != size and lora_shape[axis] not in layer_shape:  # some models store [in, out]
            yield DataError(
                f"{key}: {adapter.folder} doesn't fit this model: {name} is {list(lora_shape)}, the layer {list(layer_shape)}. "
                f"It says it was trained on {adapter.base_name!r}."
            )
            return


def _head_fits(adapter: AdapterFiles, key: str, files: ModelFiles) -> Iterator[MarlError]:
    """A score head has one label, and the width of what the model's last layer gives."""
    architecture = Architecture.of(files.config)
    kind, widths = architecture.model_type, architecture.last_widths
    if kind in POOLED_CLASSIFIERS and adapter.score_keys:
        yield ConfigError(
            f"{key}: the classifier of a {kind} scores a pooled or transformed state, not the last token's, so the shared "
            "base can't compute its rewards. Use it as a model of its own (reward: model), or another base."
        )
    file, head = adapter.reward_head
    for name, shape in head.items():
        if name.endswith("weight") and widths and shape not in {(1, width) for width in widths}:
            needed = " or ".join(f"[1, {width}]" for width in widths)
            yield DataError(
                f"{key}: the score head {name} in {file} is {list(shape)}; this model needs {needed}, one label on its hidden size. "
                "Train the classifier with num_labels=1 and a single linear head."
            )


def _stops(config: RunConfig, files: ModelFiles) -> Iterator[MarlError]:
    """A tokenizer that is named must be there, and a stop must be one of its tokens, as far as its file shows."""
    folder = Path(config.model.tokenizer or files.folder).expanduser()
    if not folder.is_dir():
        return
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    is_named = config.model.tokenizer is not None
    if is_named and not any((folder / name).is_file() for name in names):
        yield DataError(
            f"model.tokenizer: {folder} holds no tokenizer ({', '.join(names)}). Copy it there, or set model.tokenizer."
        )
    added, words = _tokens(folder)
    for stop in config.sampling.stop:
        if added | words and stop.startswith("<") and stop.endswith(">") and stop not in added | words:
            near = near_match(stop, added)
            listed = _likely_stops(folder, added)
            shown = ", ".join(listed[:STOPS_NAMED])
            shown += f" and {len(listed) - STOPS_NAMED} more" if len(listed) > STOPS_NAMED else ""
            way_out = f"Did you mean {near!r}?" if near else f"Its special tokens are {shown or 'none'}."
            yield ConfigError(f"sampling.stop: {stop!r} is no token of {folder}. {way_out}")


def _likely_stops(folder: Path, tokens: set[str]) -> list[str]:
    """The tokens, those first that may end a response: EOS, and the marks that the chat template writes."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        eos, template = config.get("eos_token"), str(config.get("chat_template") or "")
    except (OSError, ValueError, AttributeError):
        eos, template = None, ""
    with suppress(OSError, ValueError):
        template += (folder / "chat_template.jinja").read_text(encoding="utf-8")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    return sorted(tokens, key=lambda token: (token != eos, token not in template, token))


def _tokens(folder: Path) -> tuple[set[str], set[str]]:
    """The tokens that were added to a tokenizer's vocabulary, special ones among them, and those of the vocabulary itself."""
    try:
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        added = {str(token["content"]) for token in tokenizer.get("added_tokens", [])}
        return added, set(tokenizer["model"].get("vocab", ()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set(), set()
