"""What all ranks must have in common before the first step."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from marl_core.config.load import dump_config

if TYPE_CHECKING:
    from marl_core.run.runner import Runner


def trained_tensors(runner: Runner) -> list[Tensor]:
    """Every weight that learns, in a fixed order."""
    return [p for found in runner.roles.trained.parameters(runner.bank).values() for p in found.values()]


def agree_at_start(runner: Runner) -> None:
    """RankError unless all ranks have the same config, prompts, base and adapters."""
    if runner.ranks.size == 1:
        return
    config = dump_config(runner.config.model_copy(update={"observers": []}))
    bank = runner.bank
    frozen = [t for name in bank.adapters if name not in bank.trainable for t in bank.tensors(name).values()]
    for what, tensors in (
        ("the config", [_digest(config)]),
        ("the prompts", [_digest([list(row) for row in runner.data.tokens]) if runner.data else torch.zeros(1)]),
        ("the base's weights", [_digest(bank.fingerprint)]),
        ("the frozen adapters", [*frozen, *(p for head in bank.heads.values() for p in head.parameters())]),
        ("the trained weights", trained_tensors(runner)),
    ):
        runner.ranks.agree(what, tensors)


def _digest(value: object) -> Tensor:
    text = json.dumps(value, sort_keys=True, default=str).encode()
    return torch.tensor(list(hashlib.sha256(text).digest()), dtype=torch.uint8)
