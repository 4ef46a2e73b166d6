"""What headers alone tell about fit: LoRA targets that exist, adapters and heads of this base's shape, stop tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from marl_core.artifacts.adapter_files import AdapterFiles, read_adapter
from marl_core.artifacts.adapter_kinds import EMBEDDINGS, target_parameters
from marl_core.artifacts.model_files import ModelFiles
from marl_core.config.run_config import LoraSection, RunConfig
from marl_core.errors import ConfigError, DataError, MarlError
from marl_core.plan.adapter_checks import named_adapters
from marl_core.plan.chosen import Chosen
from marl_core.plan.memory import linears, matches

Shapes = Mapping[str, tuple[int, ...]]


def fit_findings(plan: Chosen, files: ModelFiles) -> Iterator[MarlError]:
    """Reasons why adapters, targets or stop tokens don't fit the model in `files`. Nothing but headers is read."""
    try:
        shapes = dict(linears(files.shapes()))
    except DataError:
        return  # damaged or missing weights are told elsewhere; a hub name's cache may hold none
    yield from _targets(plan.config.policy, "policy", shapes) if plan.config.policy.start == "new" else ()
    yield from _targets(plan.config.value, "value", shapes) if plan.value_on == "own" else ()
    for key, path, _ in named_adapters(plan):
        try:
            adapter = read_adapter(path, key)
        except DataError:
            continue  # told by whoever names it
        yield from _fits(adapter, key, shapes)
        yield from _head_fits(adapter, key, files)
    yield from _stops(plan.config, files)


def _targets(part: LoraSection, key: str, shapes: Shapes) -> Iterator[MarlError]:
    """Each module that a LoRA names must be there."""
    wanted = [part.targets] if isinstance(part.targets, str) else part.targets
    lost = [
        target
        for target in wanted
        if target != "all-linear"
        and not any(matches(target if isinstance(part.targets, str) else [target], name) for name in shapes)
    ]
    if lost:
        known = sorted({name.rsplit(".", 1)[-1] for name in shapes})
        yield ConfigError(
            f"{key}.targets: {', '.join(map(repr, lost))}: no such layer in this model; it has {', '.join(known)}."
        )


def _fits(adapter: AdapterFiles, key: str, shapes: Shapes) -> Iterator[MarlError]:
    """At least one of the layers is there, and each has its shape.

    lora_A is [r, in] and lora_B [out, r] of a layer [out, in]; names may differ by the model's own prefix.
    """
    adapted = _leaves(name.partition(".lora_")[0] for name in adapter.shapes if ".lora_" in name)
    if (
        adapted
        and not adapted & _leaves(shapes)
        and not target_parameters(adapter.config)
        and not adapted & set(EMBEDDINGS)
    ):
        yield DataError(
            f"{key}: {adapter.folder} adapts layers ({', '.join(sorted(adapted))}) of which this model has none; it has "
            f"{', '.join(sorted(_leaves(shapes)))}. It says it was trained on {adapter.base_name!r}: use that base, or another adapter."
        )
        return
    for name, found in adapter.shapes.items():
        layer, _, kind = name.partition(".lora_")
        own = layer.removeprefix("base_model.model.")
        base = shapes.get(own) or next(
            (shape for known, shape in shapes.items() if known.endswith("." + own) or own.endswith("." + known)), None
        )
        if not kind.startswith(("A.", "B.")) or base is None or len(found) != 2:
            continue
        place, wanted = (1, base[1]) if kind.startswith("A.") else (0, base[0])
        if found[place] != wanted and found[place] not in base:  # some models store [in, out]
            yield DataError(
                f"{key}: {adapter.folder} doesn't fit this model: {name} is {list(found)}, the layer {list(base)}. "
                f"It says it was trained on {adapter.base_name!r}."
            )
            return


def _leaves(names: Iterable[str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in names}


def _head_fits(adapter: AdapterFiles, key: str, files: ModelFiles) -> Iterator[MarlError]:
    """A score head has one label, and the width of what the model's last layer gives."""
    kind = files.config.get("model_type")
    if kind in POOLED and adapter.score_keys:
        yield ConfigError(
            f"{key}: the classifier of a {kind} scores a pooled or transformed state, not the last token's, so its rewards can't be had "
            "from the shared base. Use it as a model of its own (reward: model), or another base."
        )
    widths = _widths(files.config)
    file, head = adapter.reward_head
    for name, shape in head.items():
        if name.endswith("weight") and widths and shape not in {(1, width) for width in widths}:
            needed = " or ".join(f"[1, {width}]" for width in widths)
            yield DataError(
                f"{key}: the score head {name} in {file} is {list(shape)}; this model needs {needed}, one label on its hidden size. "
                "Train the classifier with num_labels=1 and a single linear head."
            )


POOLED = ("bert", "ernie", "megatron-bert", "rembert", "roc_bert", "modernbert-decoder")
"""Model types that have a causal model and a classifier whose one linear head doesn't read the last token's hidden state."""


def _widths(config: Mapping[str, Any]) -> list[int]:
    """The width of the last hidden states by config.json: another than hidden_size where a model projects at its end."""
    text = config.get("text_config")
    found = {**config, **text} if isinstance(text, Mapping) else config
    names = ("word_embed_proj_dim", "hidden_size", "n_embd", "d_model", "embedding_size")
    widths = [found[name] for name in names if isinstance(found.get(name), int)]
    return list(dict.fromkeys(widths))


def _stops(config: RunConfig, files: ModelFiles) -> Iterator[MarlError]:
    """A tokenizer that is named must be there, and a stop must be one of its tokens, as far as its file shows."""
    folder = Path(config.model.tokenizer or files.folder).expanduser()
    if not folder.is_dir():
        return
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    given = config.model.tokenizer is not None
    if given and not any((folder / name).is_file() for name in names):
        yield DataError(
            f"model.tokenizer: {folder} holds no tokenizer ({', '.join(names)}). Copy it there, or set model.tokenizer."
        )
    special = _added_tokens(folder)
    for stop in config.sampling.stop:
        if special and stop.startswith("<") and stop.endswith(">") and stop not in special:
            yield ConfigError(
                f"sampling.stop: {stop!r} is no token of {folder}; its special tokens are {', '.join(sorted(special)[:12])}."
            )


def _added_tokens(folder: Path) -> set[str]:
    try:
        found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return {str(token["content"]) for token in found.get("added_tokens", [])} | set(found["model"].get("vocab", ()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
