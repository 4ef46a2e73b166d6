"""The adapters that a run trains: made by the strategies that the config names, on the base as it was loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from marl_core.bank import peft_adapters
from marl_core.bank.adapters import AdapterBank
from marl_core.bank.targets import expand_targets
from marl_core.errors import ConfigError
from marl_core.plan.plan import Plan
from marl_core.plan.trained_checks import untried
from marl_core.ppo.seeds import derive_seed
from marl_core.registry.strategy import Adapter

SEEDS = ("projection_prng_key", "projection_seed", "proj_seed", "random_loc_seed", "random_seed")
"""Options of PEFT's configs from which parts of an adapter are drawn that nobody trains: the run's seed is theirs, too."""


def add_trained(plan: Plan, bank: AdapterBank, key: str, name: str) -> Adapter:
    """Add the adapter that the section `key` asks for, `policy` or `value`, as `name`; what its strategy says of it.

    ConfigError for targets or a dropout that this kind or this base hasn't got, and for a kind that wasn't tried on the quantization.
    """
    section = getattr(plan.config, key)
    try:
        targets = expand_targets(section.targets, bank.linears)
    except ConfigError as error:
        raise ConfigError(f"{key}.targets: {error}") from error
    adapter = plan.adapter_on(key, layers_of(bank), shapes_of(bank))
    wrong = untried(plan, key, adapter)
    if wrong is not None:
        raise ConfigError(wrong)
    make(bank, name, adapter, targets, section.dropout, key, derive_seed(plan.config.run.seed, key))
    return adapter


def make(
    bank: AdapterBank, name: str, adapter: Adapter, targets: Iterable[str], dropout: float, key: str, seed: int
) -> None:
    """Add an adapter as a strategy describes it: on these layers, with this dropout, from this seed; `key` is whose it is, for messages."""
    config = adapter.config()
    config.task_type, config.inference_mode = "CAUSAL_LM", False
    if getattr(config, "target_modules", 0) is None:  # a kind that stands on other layers has named them
        config.target_modules = set(targets)
    peft_adapters.set_dropout(config, dropout, key)
    _set_seeds(config, seed)
    bank.add(name, config, seed=seed)


def _set_seeds(config: Any, seed: int) -> None:
    """Seeds that the strategy left at PEFT's default."""
    fields = type(config).__dataclass_fields__
    for name in SEEDS:
        if name in fields and getattr(config, name) == fields[name].default:
            setattr(config, name, seed % 2**31)


def layers_of(bank: AdapterBank) -> dict[str, tuple[int, int]]:
    """The linear layers that an adapter can change, (out, in) of each, however their weights are held."""
    with bank.bare():
        modules: dict[str, Any] = dict(bank.base.named_modules())
    return {name: _linear(modules[name]) for name in bank.linears}


def _linear(module: Any) -> tuple[int, int]:
    return (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)


def shapes_of(bank: AdapterBank) -> dict[str, tuple[int, ...]]:
    """Every weight of the base; of a packed linear layer what it stands for."""
    shapes = {name: tuple(parameter.shape) for name, parameter in bank.base_parameters().items()}
    with bank.bare():
        packed = {
            f"{name}.weight": (module.out_features, module.in_features)
            for name, module in bank.base.named_modules()
            if isinstance(module, nn.Linear) and f"{name}.weight" in shapes
        }
    return shapes | packed
