"""What the ranks share out: each does its part of the rows, and every rank gets the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from marl_core.errors import DataError
from marl_core.ppo.ranks import Ranks
from marl_core.ppo.types import Prompts, Rollout

Numbers = Mapping[str, Tensor]
"""Tensors by name, the first dimension being the rows."""


def generate_in_shares(ranks: Ranks, prompts: Prompts, sample: Callable[[Prompts, int], Rollout]) -> Rollout:
    """A rollout of all prompts, of which each rank samples its part; responses to one prompt stay together.

    `sample` gets the part and its first place in the batch.
    """
    if ranks.size == 1:
        return sample(prompts, 0)
    rows = _places(len(prompts), len(prompts), ranks)[ranks.rank]
    mine = sample(_pick(prompts, rows), int(rows[0]))
    known = [text for part in ranks.everyone(list(mine.prompts.texts)) for text in part]
    whole = _gathered(ranks, mine) | {"prompts": replace(prompts, texts=known).to(mine.ids.device)}
    if mine.captured is not None:
        whole["captured"] = replace(mine.captured, **_gathered(ranks, mine.captured))
    texts = [text for part in ranks.everyone(list(mine.texts)) for text in part]
    return replace(mine, texts=texts, **whole)


def _gathered(ranks: Ranks, mine: Any) -> dict[str, Any]:
    """The tensors of a dataclass, all ranks' rows one below the other."""
    tensors = {item.name: getattr(mine, item.name) for item in fields(mine)}
    return {name: ranks.gather(value) for name, value in tensors.items() if isinstance(value, Tensor)}


def score_in_shares(ranks: Ranks, rollout: Rollout, block: int, passes: Callable[[Rollout], Numbers]) -> Numbers:
    """Numbers of a rollout of which each rank computes its part of every `block` rows.

    With the minibatch as block a rank scores the very pieces that it trains in the first epoch, so that their ratio
    is one exactly.
    """
    if ranks.size == 1:
        return passes(rollout)
    places = _places(len(rollout), min(block, len(rollout)), ranks)
    order = torch.cat(places).argsort().to(rollout.ids.device)
    mine = passes(rollout.select(places[ranks.rank]))
    return {name: ranks.gather(numbers)[order] for name, numbers in mine.items()}


def padded_places(ranks: Ranks, start: int, end: int) -> list[int]:
    """This rank's part of the places start..end-1, as many as every other rank's: the last place fills up."""
    each = -(-(end - start) // ranks.size)
    first = start + ranks.rank * each
    return [min(place, end - 1) for place in range(first, first + each)]


def _places(count: int, block: int, ranks: Ranks) -> list[Tensor]:
    """The rows of each rank: its part of every block."""
    if block % ranks.size or count % block:
        raise DataError(
            f"a batch of {count} responses in minibatches of {block} can't be shared out over {ranks.size} processes. "
            f"Give each a multiple of {ranks.size}."
        )
    rows = torch.arange(count).view(count // block, ranks.size, block // ranks.size)
    return [rows[:, rank].flatten() for rank in range(ranks.size)]


def _pick(prompts: Prompts, rows: Tensor) -> Prompts:
    places = rows.tolist()
    texts = [prompts.texts[place] for place in places] if prompts.texts else ()
    return Prompts(prompts.ids[rows], prompts.mask[rows], [prompts.rows[place] for place in places], texts)
