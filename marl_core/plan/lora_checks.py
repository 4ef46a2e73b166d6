"""LoRA options that can't serve a base which several roles share."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

from marl_core.artifacts.adapter_kinds import config_refusal
from marl_core.artifacts.architecture import is_embedding, is_output_layer
from marl_core.config.run_config import LoraSection
from marl_core.plan.chosen import Chosen

CONFIG_KEYS = {"r": "r", "lora_alpha": "alpha", "target_modules": "targets", "lora_dropout": "dropout"}
SET_BY_MARL = ("task_type", "peft_type", "inference_mode", "base_model_name_or_path")


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
    yield from config_refusal("LORA", {name: lora[name] for name in lora if name not in CONFIG_KEYS}, f"{key}.lora")
    targets = [section.targets] if isinstance(section.targets, str) else section.targets
    for target in targets:
        if is_embedding(target) or is_output_layer(target):
            yield (
                f"{key}.targets: {target!r} is the embedding or the output layer, often one tensor for both and "
                "shared by all roles. Adapt the layers between them."
            )
    if not targets:
        yield f"{key}.targets: the list is empty, so nothing would be trained. Name modules, or use all-linear."
