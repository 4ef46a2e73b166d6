"""LoRA options that can't serve a base which several roles share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

from marl_core.artifacts.adapter_kinds import REWRITING, VARIANTS
from marl_core.artifacts.architecture import is_embedding, is_output_layer
from marl_core.config.run_config import LoraSection
from marl_core.plan.chosen import Chosen

CONFIG_KEYS = {"r": "r", "lora_alpha": "alpha", "target_modules": "targets", "lora_dropout": "dropout"}
SET_BY_MARL = ("task_type", "peft_type", "inference_mode", "base_model_name_or_path")
BASE_CHANGING_OPTIONS = ("modules_to_save", "trainable_token_indices", "layer_replication")


def lora_findings(plan: Chosen) -> Iterator[str]:
    """A sentence for each option, of the policy's LoRA and of the value's own, that can't work."""
    yield from _findings(plan.config.policy, "policy")
    if plan.value_on == "own":
        yield from _findings(plan.config.value, "value")


def _findings(section: LoraSection, key: str) -> Iterator[str]:
    lora = section.lora
    for name in lora:
        if name in CONFIG_KEYS:
            yield f"{key}.lora.{name}: write {key}.{CONFIG_KEYS[name]} instead; it would be given twice."
        elif name in SET_BY_MARL:
            yield f"{key}.lora.{name}: marl sets this itself. Remove it."
        elif isinstance(lora[name], float) and not isfinite(lora[name]):
            yield f"{key}.lora.{name}: {lora[name]} is not a finite number."
    yield from _initialization(lora, key)
    if lora.get("bias", "none") != "none":
        yield f"{key}.lora.bias: {lora['bias']!r} trains biases of the base, which all roles share. Use bias: none."
    for name in BASE_CHANGING_OPTIONS:
        if lora.get(name):
            yield f"{key}.lora.{name}: changes modules of the base, which all roles share. Remove it."
    for name in sorted(set(VARIANTS) - set(BASE_CHANGING_OPTIONS)):
        if lora.get(name) not in (None, False):  # an empty section asks for the variant too
            yield f"{key}.lora.{name}: such a LoRA {VARIANTS[name]}. Remove it."
    targets = [section.targets] if isinstance(section.targets, str) else section.targets
    for target in targets:
        if is_embedding(target) or is_output_layer(target):
            yield (
                f"{key}.targets: {target!r} is the embedding or the output layer, often one tensor for both and "
                "shared by all roles. Adapt the layers between them."
            )
    if not targets:
        yield f"{key}.targets: the list is empty, so nothing would be trained. Name modules, or use all-linear."


def _initialization(lora: Mapping[str, Any], key: str) -> Iterator[str]:
    start = lora.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(REWRITING):
        yield (
            f"{key}.lora.init_lora_weights: {start!r} rewrites the base's weights, so the other roles would no "
            "longer see the model they were trained on, nor the reference the model the policy starts from. Use "
            "true or gaussian."
        )
    elif start == "mica":
        yield (
            f"{key}.lora.init_lora_weights: 'mica' trains one factor of each LoRA and keeps the other, marl trains both. "
            "Use true or gaussian."
        )
    elif start == "eva":
        yield f"{key}.lora.init_lora_weights: 'eva' needs a pass over data, which marl doesn't make. Use true or gaussian."
    elif start is False:
        yield f"{key}.lora.init_lora_weights: false starts away from the base: step-0 KL isn't 0. Use true or gaussian."
