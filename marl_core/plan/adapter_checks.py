"""Adapters that a config names and that can't serve as it asks, told from their configs and tensors' names alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from marl_core.artifacts.adapter_files import AdapterFiles, read_adapter
from marl_core.artifacts.adapter_kinds import (
    Use,
    base_refusal,
    head_beside,
    how_to_merge,
    not_a_policy,
    refusals,
    saved_embeddings,
    target_parameters,
)
from marl_core.artifacts.architecture import (
    CONVERTED_EXPERTS,
    HALVES_OF_ONE_TENSOR,
    Architecture,
    layer_of_one_expert,
    leaf,
    token_rows,
)
from marl_core.artifacts.hub import adapter_folder
from marl_core.artifacts.model_files import ModelFiles, read_model
from marl_core.errors import ConfigError, DataError, MarlError
from marl_core.plan.chosen import Chosen
from marl_core.plan.named_paths import adapter_options


def named_adapters(plan: Chosen) -> Iterator[tuple[str, str, Use]]:
    """Every adapter folder that the config names: who names it, the folder, and what becomes of it."""
    policy = plan.config.policy
    policy_folder = adapter_folder(policy.source, policy.revision, policy.subfolder) if policy.source else None
    if policy_folder is not None:
        yield "policy.from", policy_folder, "shared"
    scorers = [*plan.rewards, *plan.judges.values()]
    for strategy in (plan.reference, *(strategy for _, strategy in scorers)):
        use: Use = "merged" if plan.hooks.implements(strategy, "marl_prepare_base") else "shared"
        yield from ((plan.hooks.key_of(strategy, option), path, use) for option, path in adapter_options(strategy))


def adapter_findings(plan: Chosen) -> Iterator[MarlError]:
    """Reasons why an adapter can't stand on the shared base, or can't be merged into it."""
    model = _model(plan)
    on_weights: list[str] = []
    for key, path, use in named_adapters(plan):
        try:
            files = read_adapter(path, key)
        except DataError:
            continue  # told by whoever names it
        yield from (ConfigError(f"{key}: {sentence}") for sentence in refusals(files, use))
        wrong = not_a_policy(files) if key == "policy.from" else None
        if wrong is not None:
            yield ConfigError(f"{key}: {wrong}")
        if use == "merged":
            yield from (ConfigError(f"{key}: {sentence}") for sentence in other_rows(files, _token_rows(model)))
        else:
            yield from (ConfigError(sentence) for sentence in _on_this_base(plan, files, key))
            on_weights += [key] if target_parameters(files.config) else []
        yield from (ConfigError(f"{key}: {sentence}") for sentence in per_expert(files, _model_type(model)))
    yield from _sharded_experts(plan, on_weights)


def adapter_warnings(plan: Chosen) -> Iterator[str]:
    """A head beside the adapter that the policy continues stays where it is; a kind whose file may mean something else on this base."""
    for key, path, _ in named_adapters(plan):
        try:
            kind = read_adapter(path, key).kind
        except DataError:
            continue
        if kind.base_dependent and not kind.refused:
            yield (
                f"{key}: {kind.title} rebuilds a part of itself from the base's weights: an adapter that was trained on another dtype than "
                f"{plan.config.model.dtype} computes something else here."
            )
    source = plan.config.policy.source
    try:
        head_file = head_beside(read_adapter(source, "policy.from")) if source else None
    except DataError:
        return
    if head_file:
        yield (
            f"policy.from: {source} has a value head beside it ({head_file}), which isn't taken over: the policy is the adapter alone, and "
            "its value function starts new. If this is a reward adapter, name it in reward.path."
        )


def _on_this_base(plan: Chosen, files: AdapterFiles, key: str) -> Iterator[str]:
    """What the base's quantization and dtype say of the adapter's kind."""
    quantized = plan.config.quantization.label.rpartition("/")[2] if plan.quantization.bytes_per_weight else None
    kind = files.config.get("peft_type")
    if not files.kind.refused:
        yield from base_refusal(
            kind, files.config, key, quantization=quantized, dtype=plan.config.model.dtype, learns=key == "policy.from"
        )


def other_rows(files: AdapterFiles, rows: Mapping[str, int]) -> Iterator[str]:
    """Saved embeddings for another vocabulary than the base's: new tokens need their tokenizer too."""
    for name, shape in saved_embeddings(files).items():
        base_rows = rows.get(name.replace(".base_layer", "")) or max(rows.values(), default=shape[0])
        if shape[0] != base_rows:
            yield (
                f"{files.folder} brings embeddings for {shape[0]} tokens ({name}), the base has {base_rows}: it was trained with added "
                f"tokens, which the base's tokenizer doesn't have. Merge it first: {how_to_merge(files)} "
                "writes model and tokenizer with these tokens; then model.path: NEW."
            )
            return


def per_expert(files: AdapterFiles, kind: str | None) -> Iterator[str]:
    """Adapters of experts one by one, as transformers 4 kept them, which peft can't convert for models of this kind, or in part."""
    experts = {layer for layer in map(layer_of_one_expert, files.shapes) if layer is not None}
    if not experts or kind not in CONVERTED_EXPERTS:
        return
    if not files.kind.converted:
        yield _one_by_one(files, "peft converts LoRA alone")
        return
    outside_experts = {name for name in files.shapes if layer_of_one_expert(name) is None}
    lost_names = sorted(name for name in outside_experts if leaf(files.adapted_layer(name) or "") in experts)
    halves = [pair for pair in HALVES_OF_ONE_TENSOR if len(experts & set(pair)) == 1]
    if lost_names:
        yield _one_by_one(
            files,
            f"layers of the same name outside the experts are adapted too (first: {lost_names[0]}), whose LoRA peft's conversion loses",
        )
    elif halves:
        yield _one_by_one(files, f"only one of {' and '.join(halves[0])} is adapted, which are one tensor now")


def unconverted(files: AdapterFiles, kind: str | None, names: Iterable[str]) -> str | None:
    """Why the tensors `names` could not be loaded, where single experts' are among them; None where none are."""
    if not any(layer_of_one_expert(name) for name in names):
        return None
    return _one_by_one(files, f"peft has no conversion for the experts of a {kind}")


def _one_by_one(files: AdapterFiles, why: str) -> str:
    return (
        f"{files.folder} adapts experts one by one, as transformers 4 kept them; transformers 5 keeps one tensor for all of them, and "
        f"{why}. Merge it with transformers 4 and peft, and give the merged model as model.path."
    )


def _sharded_experts(plan: Chosen, keys: list[str]) -> Iterator[MarlError]:
    """Adapters on single weights, experts above all, on a base that several processes share out."""
    if keys and plan.config.model.shard != "none":
        yield ConfigError(
            f"target_parameters ({keys[0]}) with model.shard: nobody has measured that sharded experts with a LoRA give the "
            "plain ones' numbers. Set model.shard: none, or adapt layers (targets) only."
        )
    if "policy.from" in keys and plan.config.policy.dropout > 0:
        yield ConfigError(
            f"policy.dropout: {plan.config.policy.dropout}, but peft has no dropout for target_parameters. Set it to 0."
        )


def _model(plan: Chosen) -> ModelFiles | None:
    try:
        return read_model(plan.config.model.path, plan.config.model.revision)
    except DataError:
        return None  # told elsewhere


def _model_type(files: ModelFiles | None) -> str | None:
    return Architecture.of(files.config).model_type if files else None


def _token_rows(files: ModelFiles | None) -> dict[str, int]:
    """Rows of the base's embedding and output layer by name."""
    try:
        return token_rows(files.shapes()) if files else {}
    except DataError:
        return {}
