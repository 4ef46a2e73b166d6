"""What a model has room for: how many tokens it knows, and how many it can read at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
"""What configs call the number of positions; most answer to the first."""


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
    named = (getattr(config, name, None) for name in NAMES)
    most = next((int(value) for value in named if isinstance(value, int | float) and 0 < value < 2**31), None)
    if most is None:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    stretched = int(original * factor) if original and factor else 0
    return max(most, stretched) - _skipped(model, most)


def learned_positions(model: PreTrainedModel) -> int | None:
    """The position limit of a model that looks its positions up in a table, which ends there; None of any other."""
    tables = (name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    return position_limit(model) if any(leaf == "wpe" or "pos" in leaf for leaf in tables) else None


def _skipped(model: PreTrainedModel, most: int) -> int:
    """Positions at the beginning of a learned table that no token gets."""
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and module.num_embeddings == most
        if is_table and "pos" in name.rpartition(".")[2] and module.padding_idx is not None:
            return int(module.padding_idx) + 1
    return 0
