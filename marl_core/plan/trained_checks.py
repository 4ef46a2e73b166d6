"""What can be said of the adapters that are made for a run without the model: targets that can't be meant, and bases not tried."""

from __future__ import annotations

from collections.abc import Iterator

from marl_core.artifacts.adapter_files import read_adapter
from marl_core.artifacts.architecture import is_embedding, is_output_layer
from marl_core.artifacts.hub import adapter_folder
from marl_core.artifacts.kind_table import kind_name, tried_on
from marl_core.config.adapter_config import AdapterSection
from marl_core.errors import DataError, MarlError
from marl_core.plan.chosen import Chosen
from marl_core.registry.strategy import Adapter


def trained_findings(plan: Chosen) -> Iterator[str]:
    """A sentence for each key that can't work, of the policy's adapter and of the value's own."""
    for key, (section, _) in plan.adapter_strategies.items():
        yield from _targets(section, key)
        try:
            adapter = plan.adapter_said(key)
        except MarlError as error:
            yield str(error)
            continue
        sentence = untried(plan, key, adapter) if adapter is not None else None
        if sentence is not None:
            yield sentence
    yield from _other_kind(plan)


def untried(plan: Chosen, key: str, adapter: Adapter) -> str | None:
    """Why this kind of adapter may not stand on the base as it is quantized; None where it may."""
    label = plan.config.quantization.label.rpartition("/")[2]
    if adapter.was_tried_on(label) or not _packs(plan):
        return None
    section, strategy = plan.adapter_strategies[key]
    kind = (plan.hooks.describe(strategy, plan) or section.label).partition(" on the base")[0]
    return (
        f"{key}: quantization {label}: {kind} isn't among the kinds that were found right on it: others fail there, or take "
        "packed bytes for weights without a word. "
        f"Kinds that were: {', '.join(tried_on(label)) or 'lora'}."
    )


def _packs(plan: Chosen) -> bool:
    """Whether the base's weights are held as something else than numbers of model.dtype."""
    quantization = plan.quantization
    return quantization.config is not None or quantization.bytes_per_weight is not None


def _targets(section: AdapterSection, key: str) -> Iterator[str]:
    targets = [section.targets] if isinstance(section.targets, str) else section.targets
    for target in targets:
        if is_embedding(target) or is_output_layer(target):
            yield (
                f"{key}.targets: {target!r} is the embedding or the output layer, often one tensor for both and "
                "shared by all roles. Adapt the layers between them."
            )
    if not targets:
        yield f"{key}.targets: the list is empty, so nothing would be trained. Name modules, or use all-linear."


def _other_kind(plan: Chosen) -> Iterator[str]:
    """A kind that is named beside an adapter of another kind that the policy continues."""
    policy = plan.config.policy
    if policy.source is None or "use" not in policy.model_fields_set:
        return
    folder = adapter_folder(policy.source, policy.revision, policy.subfolder)
    try:
        kind = kind_name(read_adapter(folder, "policy.from").config.get("peft_type")) if folder is not None else ""
    except DataError:
        return  # told by whoever reads it
    if kind and policy.label != kind:
        yield f"policy.use: {policy.label}, and {policy.source} is a {kind} adapter, which decides. Remove policy.use."
