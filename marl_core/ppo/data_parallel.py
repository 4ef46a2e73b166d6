"""Data parallelism: each rank samples or scores its part of the rows, and every rank gets the results of all."""

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
    """A rollout of all prompts, of which each rank samples its part; responses to one prompt stay together.

    limits [n * samples] int64: most tokens of each response. DataError when the prompts can't be divided evenly by the ranks.
    """
    if ranks.size == 1:
        return sampler(prompts, seed, samples=samples, limits=limits)
    total = len(prompts) * samples
    rows = _rows_of_ranks(len(prompts), len(prompts), ranks)[ranks.rank]
    first = int(rows[0]) * samples
    part = sampler(
        prompts.select(rows),
        seed,
        samples=samples,
        limits=None if limits is None else limits[first : first + len(rows) * samples],
        shard=Shard(first, total),
    )
    prompt_texts = [text for texts in ranks.all_gather_object(list(part.prompts.texts)) for text in texts]
    texts = [text for texts in ranks.all_gather_object(list(part.texts)) for text in texts]
    repeated = prompts.repeat(samples)
    gathered: dict[str, Any] = {
        "prompts": replace(repeated, texts=prompt_texts).to(part.ids.device),
        "behavior": None if part.behavior is None else _gathered(ranks, part.behavior),
    }
    tensors = {name: ranks.gather(getattr(part, name)) for name in ("ids", "mask", "finished")}
    return replace(part, texts=texts, **{**gathered, **tensors})


def score_sharded(ranks: Ranks, rollout: Rollout, block: int, score: Callable[[Rollout], Numbers]) -> Numbers:
    """What `score` gives for a rollout, of which each rank scores its part of every `block` rows.

    With the minibatch as block a rank scores the very pieces that it trains in the first epoch, so that their ratio
    is one exactly. DataError when a block can't be divided evenly by the ranks.
    """
    if ranks.size == 1:
        return score(rollout)
    rows = _rows_of_ranks(len(rollout), min(block, len(rollout)), ranks)
    order = torch.cat(rows).argsort().to(rollout.ids.device)
    scored: Numbers = _gathered(ranks, score(rollout.select(rows[ranks.rank])), order)
    return scored


def padded_rows(ranks: Ranks, start: int, end: int) -> list[int]:
    """The rows start..end-1, padded by repeating the last one until every rank has equally many."""
    per_rank = -(-(end - start) // ranks.size)
    return [min(row, end - 1) for row in range(start, start + per_rank * ranks.size)]


def _gathered(ranks: Ranks, part: Any, order: Tensor | None = None) -> Any:
    """All ranks' tensors one below the other, in `order`, at any depth of dataclasses and mappings."""
    if isinstance(part, Tensor):
        rows = ranks.gather(part)
        return rows if order is None else rows[order]
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
