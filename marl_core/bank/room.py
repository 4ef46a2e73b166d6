"""What a model has room for: how many tokens it knows, and how many it can read at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from marl_core.artifacts.architecture import (
    POSITIONS_KEYS,
    ROTARY_KEYS,
    is_position_table,
    named_positions,
    positions,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def vocabulary_of(model: PreTrainedModel) -> int:
    """How many tokens a model has input embeddings for: ids from 0 up to this number."""
    embeddings: Any = model.get_input_embeddings()
    return int(getattr(embeddings, "num_embeddings", 0) or embeddings.weight.shape[0])


def position_limit(model: PreTrainedModel) -> int | None:
    """Most tokens of one sequence that a model has positions for; None where its config names no bound.

    A rotary model that was stretched has its original number times the factor. Models of RoBERTa's kind count positions from
    behind their padding index, and have that many fewer.
    """
    config = model.config.get_text_config()
    said = {key: getattr(config, key, None) for key in (*POSITIONS_KEYS, *ROTARY_KEYS)}
    limit, named = positions(said), named_positions(said)
    return None if limit is None or named is None else limit - _skipped(model, named)


def learned_positions(model: PreTrainedModel) -> int | None:
    """The position limit of a model that looks its positions up in a table, which ends there; None of any other."""
    tables = (name for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    return position_limit(model) if any(is_position_table(name) for name in tables) else None


def _skipped(model: PreTrainedModel, named: int) -> int:
    """Positions at the beginning of a learned table that no token gets."""
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and module.num_embeddings == named and is_position_table(name)
        if is_table and module.padding_idx is not None:
            return int(module.padding_idx) + 1
    return 0
