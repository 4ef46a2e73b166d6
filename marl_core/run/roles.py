"""From a Plan to the roles of a run: bank, trained adapters, reference, reward sources, judges."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.base import Prepare
from marl_core.bank.heads import value_head_of
from marl_core.bank.trunk import PassOptions
from marl_core.config.choice import RewardChoice
from marl_core.config.run_config import ModelSection
from marl_core.errors import ConfigError
from marl_core.logs import LOADING, logger
from marl_core.plan.named_paths import own_model
from marl_core.plan.plan import Plan
from marl_core.ppo.roles import RewardSource, Roles, TrainableRoles
from marl_core.registry.strategy import Adapter, Quantization, Strategy
from marl_core.run.trained_adapters import add_trained
from marl_core.safety.findings import PreflightCheck
from marl_core.safety.gradient_check import gradient_survives


@dataclass(frozen=True, slots=True)
class BuiltRoles:
    """A bank with the roles of one run, the options of its passes, and the gradient check made while they were built."""

    bank: AdapterBank
    roles: Roles
    options: PassOptions
    """How this run's passes go through the base."""
    gradient: PreflightCheck
    """The gradient check's result, right after the policy was added."""
    added: tuple[str, ...] = ()
    """Names of the adapters and heads that building the roles added to the bank."""
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    """What the strategies say of the adapters that were made, by role: `policy`, `value`."""

    @property
    def rates(self) -> dict[str, Mapping[str, float]]:
        """Factors on the learning rate by a part of a parameter's name, of each role."""
        return {role: adapter.rates for role, adapter in self.adapters.items()}

    def discard(self) -> None:
        """Take what was added out of the bank again: a shared bank is as it was."""
        _remove(self.bank, set(self.added))


def build_roles(plan: Plan, policy: str, bank: AdapterBank | None = None) -> BuiltRoles:
    """Load the base (or take the given bank), add policy and value, ask the strategies for reference and rewards.

    ConfigError when the bank doesn't fit the config. When anything fails, the given bank is left as it was.
    """
    bank = _bank(plan, bank)
    before = {*bank.adapters, *bank.heads}
    try:
        built = _build(plan, policy, bank)
    except BaseException:
        _remove(bank, {*bank.adapters, *bank.heads} - before)
        raise
    return replace(built, added=tuple({*bank.adapters, *bank.heads} - before))


def _remove(bank: AdapterBank, names: set[str]) -> None:
    for name in [name for name in bank.adapters if name in names]:
        bank.remove(name)
    for name in [name for name in bank.heads if name in names]:
        del bank.heads[name]


def _build(plan: Plan, policy: str, bank: AdapterBank) -> BuiltRoles:
    if policy in bank.adapters:
        raise ConfigError(
            f"policy: this bank already has an adapter {policy!r}; give this Runner another name: Runner(config, bank=bank, policy='...')."
        )
    config = plan.config
    if config.model.gradient_checkpointing and not bank.quantization.same_kernels:
        raise ConfigError(
            "model.gradient_checkpointing: this quantization uses different kernels in train and eval mode, checkpointing needs "
            "train mode and sampling eval mode, so old and new log-probs would differ. Use another quantization, or no checkpointing."
        )
    made = {"policy": _add_policy(plan, bank, policy)}
    gradient = gradient_survives(bank, policy)
    value_adapter, value_head, made["value"] = _add_value(plan, bank, policy)
    speed = config.speed
    options = bank.trunk.prepare(
        PassOptions(
            pack=speed.pack,
            compiled=speed.compile,
            recompute=config.model.gradient_checkpointing,
            recompute_cheap=speed.recompute_cheap,
            short_attention=speed.short_attention,
        )
    )
    bank.trunk.sampler(speed.decode)  # a model that can't be sampled from is refused here, not at the first step
    started = time.perf_counter()
    with bank.trunk.passing(options):
        roles = _roles(plan, bank, TrainableRoles(policy, value_head, value_adapter))
    names = [f"reference {config.reference.label}", *(f"reward {source.name}" for source in roles.rewards)]
    logger(LOADING).info(
        "roles: policy, value on %s, %s; %.1f s", plan.value_on, ", ".join(names), time.perf_counter() - started
    )
    return BuiltRoles(
        bank, roles, options, gradient, adapters={key: adapter for key, adapter in made.items() if adapter}
    )


def _roles(plan: Plan, bank: AdapterBank, trained: TrainableRoles) -> Roles:
    """The roles, with reference, rewards and judges as the strategies give them."""
    judges = [(choice.model_copy(update={"name": name}), judge) for name, (choice, judge) in plan.judges.items()]
    return Roles(
        trained=trained,
        reference=plan.hooks.reference(plan.reference, bank, plan.config.sampling.temperature, trained.policy),
        reference_origin=plan.hooks.origin(plan.reference),
        rewards=reward_sources(plan, bank, plan.rewards),
        judges=reward_sources(plan, bank, judges, "judge"),
    )


def _bank(plan: Plan, bank: AdapterBank | None) -> AdapterBank:
    prepares = plan.hooks.implements(plan.reference, "marl_prepare_base")
    prepared = f"{plan.config.reference.label} {plan.reference.model_dump_json()}" if prepares else ""
    if bank is not None:
        if bank.prepared != prepared:
            raise ConfigError(
                f"reference: this run's base must be prepared by [{prepared or 'nothing'}], "
                f"the bank you share was by [{bank.prepared or 'nothing'}]. "
                "Runners that share a bank need references that leave the base the same."
            )
        _same_base(plan, bank)
        return bank
    prepare = (lambda base: plan.hooks.prepare_base(plan.reference, base)) if prepares else None
    return load_bank(plan.config.model, plan.config.run.device, plan.quantization, prepare, prepared)


def load_bank(
    model: ModelSection, device: str, quantization: Quantization, prepare: Prepare | None, prepared: str
) -> AdapterBank:
    """A new bank on the base that `model` names; `prepared`: what `prepare` does to it, in words. Raises as AdapterBank.from_pretrained."""
    bank = AdapterBank.from_pretrained(
        model.path,
        dtype=model.dtype,
        tokenizer=model.tokenizer,
        device=device,
        revision=model.revision,
        attention=model.attention,
        trust_remote_code=model.trust_remote_code,
        quantization=quantization,
        prepare=prepare,
        shard=model.shard != "none",
    )
    bank.prepared = prepared
    return bank


def _same_base(plan: Plan, bank: AdapterBank) -> None:
    """ConfigError when the config asks for another base than the shared bank holds."""
    model, quantized = plan.config.model, bank.quantization.config is not None
    wrong = [f"model.path is {model.path!r}, the bank's base {bank.source!r}"] if model.path != bank.source else []
    bank_dtype = str(bank.base.dtype).removeprefix("torch.")
    wrong += (
        [f"model.dtype is {model.dtype}, the bank's {bank_dtype}"]
        if not quantized and model.dtype != bank_dtype
        else []
    )
    run_quantization = plan.quantization.config
    run_settings, bank_settings = (
        str(config.to_dict()) if config is not None else "none"
        for config in (run_quantization, bank.quantization.config)
    )
    wrong += (
        [f"quantization is {plan.config.quantization.label}, the bank was loaded otherwise"]
        if run_settings != bank_settings
        else []
    )
    if wrong:
        raise ConfigError(
            f"bank: the bank you share holds another base: {'; '.join(wrong)}. Make the configs agree, or load a bank of its own."
        )


def _add_policy(plan: Plan, bank: AdapterBank, name: str) -> Adapter | None:
    part = plan.config.policy
    if part.start == "continue":
        bank.load(
            name,
            part.source or "",
            trainable=True,
            dropout=part.dropout,
            asked_by="policy.from",
            revision=part.revision,
            subfolder=part.subfolder,
        )
    else:
        return add_trained(plan, bank, "policy", name)
    return None


def _add_value(plan: Plan, bank: AdapterBank, policy: str) -> tuple[str | None, str | None, Adapter | None]:
    """Names of the value's adapter and head, and what its strategy says of the adapter; None for what it doesn't have."""
    placement = plan.value_on
    if placement == "none":
        return None, None, None
    adapter = made = None
    if placement == "own":
        adapter = f"{policy}-value"
        made = add_trained(plan, bank, "value", adapter)
    bank.add_value_head(value_head_of(policy))
    return adapter, value_head_of(policy), made


def reward_sources(
    plan: Plan,
    bank: AdapterBank,
    chosen: tuple[tuple[RewardChoice, Strategy], ...] | list[tuple[RewardChoice, Strategy]],
    role: str = "reward",
) -> tuple[RewardSource, ...]:
    """What the strategies of rewards or judges score with, each under its name in metrics and samples."""
    labels = [choice.name or choice.label for choice, _ in chosen]
    repeated = {label for label, count in Counter(labels).items() if count > 1}
    sources = []
    for index, (choice, strategy) in enumerate(chosen):
        label = f"{labels[index]}-{index + 1}" if labels[index] in repeated else labels[index]
        model = own_model(strategy)
        if model is not None:
            logger(LOADING).info("%s %s: model %s", role, label, model)
        score = plan.hooks.reward(strategy, bank, bank.tokenizer)
        function = getattr(score, "label", "")  # which function of the user's, where the strategy calls one
        origin = "; ".join(filter(None, (str(function), plan.hooks.origin(strategy))))
        sources.append(RewardSource(label, choice.weight, score, origin, role))
    return tuple(sources)
