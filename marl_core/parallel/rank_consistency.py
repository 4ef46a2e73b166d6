"""What all ranks must have in common before the first step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from marl_core.bank.adapters import AdapterBank
from marl_core.config.load import dump_config
from marl_core.config.run_config import RunConfig
from marl_core.ppo.ranks import Ranks
from marl_core.ppo.roles import TrainableRoles


def trained_tensors(bank: AdapterBank, trained: TrainableRoles) -> list[Tensor]:
    """Every weight that learns, in a fixed order."""
    return [p for parameters in trained.parameters(bank).values() for p in parameters.values()]


def require_same_start(
    ranks: Ranks, config: RunConfig, bank: AdapterBank, trained: TrainableRoles, prompts: Sequence[Sequence[int]] | None
) -> None:
    """RankError unless all ranks have the same config, prompts (their tokens), base and adapters."""
    if ranks.size == 1:
        return
    written = dump_config(config.model_copy(update={"observers": []}))
    frozen = [t for name in bank.adapters if name not in bank.trainable for t in bank.tensors(name).values()]
    for what, tensors in (
        ("the config", [_digest(written)]),
        ("the prompts", [torch.zeros(1) if prompts is None else _digest([list(row) for row in prompts])]),
        ("the base's weights", [_digest(bank.fingerprint)]),
        ("the frozen adapters", [*frozen, *(p for head in bank.heads.values() for p in head.parameters())]),
        ("the trained weights", trained_tensors(bank, trained)),
    ):
        ranks.assert_equal(what, tensors)


def _digest(value: object) -> Tensor:
    text = json.dumps(value, sort_keys=True, default=str).encode()
    return torch.tensor(list(hashlib.sha256(text).digest()), dtype=torch.uint8)
