"""Whether transformers' own classifier of this base reads a score head the way the bank does: tried, on the shared weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from marl_core.artifacts.adapter_files import SCORE_KEYS, AdapterFiles
from marl_core.bank.out_of_memory import raise_if_out_of_memory
from marl_core.bank.reward_bank import RewardBank
from marl_core.bank.views import ScoreView
from marl_core.errors import DataError

SCORE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}
"""Relative to the score's own size (at least 1): another state or another token is off by about the score itself."""


class _Head(nn.Module):
    """A float32 head on hidden states of any dtype."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head
        self.weight = head.weight

    def forward(self, states: Tensor) -> Tensor:
        scores: Tensor = self.head(states.float())
        return scores


@torch.no_grad()
def refuse_other_reading(bank: RewardBank, view: ScoreView, files: AdapterFiles, asked_by: str) -> None:
    """DataError when the classifier that trained this adapter does more than a linear head on the last token's hidden state.

    The classifier is built without weights and gets the bank's trunk and head: what it lacks then isn't in the adapter's file.
    """
    classifier = _classifier(bank, view, files)
    if classifier is None:
        return
    name, judge = classifier
    ids = torch.arange(4, 8, device=bank.device)[None] % bank.trunk.vocabulary
    ids = torch.where(ids == view.pad_id, ids + 1, ids) if view.pad_id is not None else ids
    mask = torch.ones_like(ids)
    mine = bank.score(view, ids, mask.bool())
    lacking = [key for key, parameter in judge.named_parameters() if parameter.is_meta]
    try:
        if lacking:
            raise LookupError(f"weights of its own, {lacking[0]}")
        with bank.view(view.view):
            theirs = judge(input_ids=ids, attention_mask=mask).logits.float().reshape(-1)
        same = theirs.shape == mine.shape and float((mine - theirs).abs()) <= _allowed(bank) * max(
            1.0, float(mine.abs())
        )
        why = (
            ""
            if same
            else f"it gives {theirs.flatten().tolist()[:2]}, a linear head on the last token's state {mine.tolist()}"
        )
    except Exception as error:  # it needs something that the adapter's file and the causal model haven't
        raise_if_out_of_memory(error)
        why = f"it needs more than that ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
    if why:
        raise DataError(
            f"{asked_by}: transformers' {name} doesn't score with one linear head on the last token's hidden state: {why}. The shared "
            "base can't compute its rewards. Use it as a model of its own (reward: model), or train a reward adapter on a base whose "
            "classifier has such a head."
        )


def _classifier(bank: RewardBank, view: ScoreView, files: AdapterFiles) -> tuple[str, Any] | None:
    """transformers' classifier for this base around the bank's own trunk and head; None where there is none to compare with."""
    if not files.score_keys or bank.trunk.sharded:
        return None  # LLaMA-Factory's heads read the trunk's last state by definition
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(bank.base.config), None)
    if kind is None:
        return None
    config: Any = copy.deepcopy(bank.base.config)
    config.num_labels, config.pad_token_id = 1, view.pad_id
    with torch.device("meta"):
        judge: Any = kind(config)
    place = judge.base_model_prefix
    if type(getattr(judge, place, None)) is not type(bank.trunk.body):
        return None
    own = [key for key in (files.score_keys[0].split(".")[2], *SCORE_KEYS) if hasattr(judge, key)]
    if not own:  # a head of another class than transformers' own
        return None
    setattr(judge, place, bank.trunk.body)
    setattr(judge, own[0], _Head(bank.heads[view.head]))
    modes = {module: module.training for module in bank.trunk.body.modules()}
    for module in judge.modules():
        module.training = modes.get(module, False)
    return kind.__name__, judge


def _allowed(bank: RewardBank) -> float:
    return SCORE_TOLERANCE.get(bank.trunk.precision, 0.1) if bank.quantization.config is None else 0.5
