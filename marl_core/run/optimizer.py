"""AdamW over explicit parameters by role, and the learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from marl_core.config.run_config import PPOSection, RunConfig


def make_optimizer(roles: Mapping[str, Mapping[str, nn.Parameter]], config: RunConfig) -> torch.optim.AdamW:
    """One parameter group for each role, with the role's own learning rate."""
    rates = {"value": config.value.learning_rate or config.ppo.learning_rate}
    groups = []
    for role, parameters in roles.items():
        rate = rates.get(role, config.ppo.learning_rate)
        groups.append({"params": list(parameters.values()), "lr": rate, "initial_lr": rate, "role": role})
    first, second = config.ppo.adam_betas
    return torch.optim.AdamW(
        groups, betas=(first, second), eps=config.ppo.adam_eps, weight_decay=config.ppo.weight_decay
    )


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
