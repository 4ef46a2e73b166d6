"""Reward adapters on the shared base: loaded with head and reading, checked against the base, applied."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from marl_core.bank import heads, peft_adapters
from marl_core.bank.identity.reward_check import Reading, check_reward
from marl_core.bank.reward_bank import RewardBank
from marl_core.bank.reward_class import refuse_other_reading
from marl_core.bank.views import Position, ScoreView, View
from marl_core.errors import ConfigError, DataError


def load(
    bank: RewardBank,
    path: str | Path,
    position: Position | None,
    pad_id: int | None,
    asked_by: str,
    revision: str | None = None,
    subfolder: str | None = None,
) -> ScoreView:
    """See AdapterBank.load_reward. The bank is as it was when this fails."""
    if position is not None and position not in get_args(Position):
        raise ConfigError(f"{asked_by}: position: {position!r} is none of {', '.join(get_args(Position))}.")
    if pad_id is not None and not isinstance(pad_id, int):
        raise ConfigError(f"{asked_by}: pad_id: expected a token's number, got {pad_id!r}.")
    files = peft_adapters.find_adapter(path, asked_by, revision, subfolder)
    head = heads.read_score_head(files, bank.trunk.hidden_size, asked_by)
    before = set(bank.adapters)
    name = bank.frozen(path, "reward", asked_by, revision=revision, subfolder=subfolder)
    bank.heads.setdefault(heads.score_head_of(name), head.to(bank.device))
    reading = Reading.of(files, bank.tokenizer)
    pad = pad_id if pad_id is not None else reading.pad_id
    view = ScoreView(View(name), heads.score_head_of(name), position or reading.position, pad)
    try:
        refuse_other_reading(bank, view, files, asked_by)
        checked = check_reward(bank, view, files, asked_by)
    except DataError:
        if name not in before:
            bank.remove(name)
        raise
    bank.reward_checks.setdefault(name, checked)
    bank.reward_views.setdefault(name, view)
    return view


@torch.no_grad()
def score(bank: RewardBank, view: ScoreView, ids: Tensor, mask: Tensor) -> Tensor:
    """Scores of whole sequences: ids, mask [B, L], padded on either side -> [B] float32. The LM head is never run."""
    with bank.view(view.view):
        hidden = bank.trunk.hidden(ids, mask)
    places = heads.score_positions(ids, mask, view.position, view.pad_id)
    rows = torch.arange(len(ids), device=ids.device)
    return heads.apply_head(bank.heads[view.head], hidden[rows, places])


def named(bank: RewardBank, reward: ScoreView | str) -> ScoreView:
    """The view of a reward adapter, given as itself or by the adapter's name; ConfigError when it is neither."""
    if isinstance(reward, ScoreView):
        return reward
    if reward not in bank.reward_views:
        names = ", ".join(bank.reward_views) or "none"
        raise ConfigError(
            f"This bank has no reward adapter {reward!r}; it has: {names}. load_reward gives what to score with."
        )
    return bank.reward_views[reward]


def only(bank: RewardBank) -> ScoreView:
    """The bank's one reward adapter; ConfigError when it has none or several."""
    if len(bank.reward_views) != 1:
        names = ", ".join(bank.reward_views) or "none"
        raise ConfigError(
            f"This bank has {len(bank.reward_views)} reward adapters ({names}): load one with load_reward, "
            "or say which by reward=."
        )
    return next(iter(bank.reward_views.values()))
