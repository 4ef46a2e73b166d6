"""AdamW over explicit parameters by role, and the learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from marl_core.config.run_config import PPOSection, RunConfig
from marl_core.errors import ConfigError


def make_optimizer(
    roles: Mapping[str, Mapping[str, nn.Parameter]],
    config: RunConfig,
    factors: Mapping[str, Mapping[str, float]] | None = None,
) -> torch.optim.AdamW:
    """A parameter group for each role and each factor on the role's learning rate, the group without one first.

    `factors`: by role, factors by a part of a parameter's name (`{"policy": {"lora_B": 16.0}}`). ConfigError for a part that no
    parameter of the role has in its name.
    """
    rates = {"value": config.value.learning_rate or config.ppo.learning_rate}
    groups = []
    for role, parameters in roles.items():
        rate = rates.get(role, config.ppo.learning_rate)
        for factor, members in _by_factor(role, parameters, (factors or {}).get(role, {})).items():
            groups.append(
                {"params": members, "lr": rate * factor, "initial_lr": rate * factor, "role": role, "factor": factor}
            )
    first, second = config.ppo.adam_betas
    return torch.optim.AdamW(
        groups, betas=(first, second), eps=config.ppo.adam_eps, weight_decay=config.ppo.weight_decay
    )


def _by_factor(
    role: str, parameters: Mapping[str, nn.Parameter], factors: Mapping[str, float]
) -> dict[float, list[nn.Parameter]]:
    """A role's parameters by the factor on its rate: 1 where no part of a name has one. Those of 1 come first, if there are any."""
    found: dict[float, list[nn.Parameter]] = {1.0: []}
    unused = set(factors)
    for name, parameter in parameters.items():
        parts = [part for part in name.split(".") if part in factors]
        unused -= set(parts)
        found.setdefault(math.prod(factors[part] for part in parts), []).append(parameter)
    if unused:
        raise ConfigError(
            f"{role}: its adapter gives a learning rate of its own to {', '.join(sorted(unused))}, and no parameter has that in its name "
            f"(first: {next(iter(parameters), 'none')}). Correct Adapter.rates of the strategy, or its options."
        )
    return {factor: members for factor, members in found.items() if members}


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, ppo: PPOSection) -> None:
    """Each role's rate at PPO step `step` (0-based)."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * learning_rate_factor(step, ppo)


def learning_rate_factor(step: int, ppo: PPOSection) -> float:
    """Factor on the peak rate at PPO step `step` (0-based): linear warm-up, then constant, linear or cosine to 0 at `ppo.steps`.

    A loop by hand may go beyond `ppo.steps`: there the factor stays what it was at the schedule's end.
    """
    if step < ppo.warmup_steps:
        return (step + 1) / ppo.warmup_steps
    progress = min(1.0, (step - ppo.warmup_steps) / max(1, ppo.steps - ppo.warmup_steps))
    if ppo.schedule == "linear":
        return 1.0 - progress
    if ppo.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0
