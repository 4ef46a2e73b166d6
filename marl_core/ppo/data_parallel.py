"""What the ranks share out: each does its part of the rows, and every rank gets the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from marl_core.errors import DataError
from marl_core.ppo.ranks import Ranks
from marl_core.ppo.sampling.sampler import Sampler, Shard
from marl_core.ppo.types import Prompts, Rollout

Numbers = TypeVar("Numbers")
"""A dataclass of tensors whose first dimension is the rows."""


def sample_sharded(
    ranks: Ranks, sampler: Sampler, prompts: Prompts, seed: int, samples: int, limits: Tensor | None
) -> Rollout:
    """A rollout of all prompts, of which each rank samples its part; responses to one prompt stay together."""
    if ranks.size == 1:
        return sampler(prompts, seed, samples=samples, limits=limits)
    total = len(prompts) * samples
    mine = _rows_of_ranks(len(prompts), len(prompts), ranks)[ranks.rank]
    first = int(mine[0]) * samples
    part = sampler(
        prompts.select(mine),
        seed,
        samples=samples,
        limits=None if limits is None else limits[first : first + len(mine) * samples],
        shard=Shard(first, total),
    )
    read = [text for texts in ranks.all_gather_object(list(part.prompts.texts)) for text in texts]
    texts = [text for texts in ranks.all_gather_object(list(part.texts)) for text in texts]
    repeated = prompts.repeat(samples)
    whole: dict[str, Any] = {
        "prompts": replace(repeated, texts=read).to(part.ids.device),
        "behavior": None if part.behavior is None else _gathered(ranks, part.behavior),
    }
    tensors = {name: ranks.gather(getattr(part, name)) for name in ("ids", "mask", "finished")}
    return replace(part, texts=texts, **{**whole, **tensors})


def score_sharded(ranks: Ranks, rollout: Rollout, block: int, score: Callable[[Rollout], Numbers]) -> Numbers:
    """Numbers of a rollout of which each rank computes its part of every `block` rows.

    With the minibatch as block a rank scores the very pieces that it trains in the first epoch, so that their ratio
    is one exactly.
    """
    if ranks.size == 1:
        return score(rollout)
    rows = _rows_of_ranks(len(rollout), min(block, len(rollout)), ranks)
    order = torch.cat(rows).argsort().to(rollout.ids.device)
    found: Numbers = _gathered(ranks, score(rollout.select(rows[ranks.rank])), order)
    return found


def padded_rows(ranks: Ranks, start: int, end: int) -> list[int]:
    """The rows start..end-1, as many for every rank: the last row fills up."""
    each = -(-(end - start) // ranks.size)
    return [min(row, end - 1) for row in range(start, start + each * ranks.size)]


def _gathered(ranks: Ranks, part: Any, order: Tensor | None = None) -> Any:
    """All ranks' tensors one below the other, in `order`, at any depth of dataclasses and mappings."""
    if isinstance(part, Tensor):
        whole = ranks.gather(part)
        return whole if order is None else whole[order]
    if isinstance(part, Mapping):
        return {name: _gathered(ranks, value, order) for name, value in part.items()}
    if is_dataclass(part) and not isinstance(part, type):
        changed = {item.name: getattr(part, item.name) for item in fields(part)}
        return replace(part, **{name: _gathered(ranks, value, order) for name, value in changed.items()})
    return part


def _rows_of_ranks(count: int, block: int, ranks: Ranks) -> list[Tensor]:
    """The rows of each rank: its part of every block."""
    if block % ranks.size or count % block:
        raise DataError(
            f"a batch of {count} responses in minibatches of {block} can't be shared out over {ranks.size} processes. "
            f"Give each a multiple of {ranks.size}."
        )
    rows = torch.arange(count).view(count // block, ranks.size, block // ranks.size)
    return [rows[:, rank].flatten() for rank in range(ranks.size)]
