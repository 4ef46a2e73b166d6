"""Stop tokens: which end a response, and where a response ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from marl_core.artifacts.tokenizer import in_vocabulary, stop_token
from marl_core.config.run_config import SamplingSection
from marl_core.errors import ConfigError, warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, sampling: SamplingSection, model_eos: Any, vocabulary: int | None = None
) -> list[int]:
    """All tokens that end a response: the tokenizer's EOS, the model's own (an id, or several in whatever holds them), and
    `sampling.stop`.

    Ids that the model can't sample, beyond its `vocabulary`, are left out with a MarlWarning; ConfigError where one is asked for,
    or none is left.
    """
    ids = set(_ids(tokenizer.eos_token_id)) | set(_ids(model_eos))
    foreign = sorted(token for token in ids if not in_vocabulary(token, vocabulary))
    if foreign:
        warn(
            f"sampling: the end tokens {', '.join(map(str, foreign))} of this tokenizer or its generation_config are outside the model's "
            f"vocabulary of {vocabulary} tokens, so they can't be sampled; they are left out."
        )
    ids -= set(foreign)
    for text in sampling.stop:
        ids.add(stop_token(tokenizer, text, vocabulary))
    if not ids:
        raise ConfigError(
            "sampling: this tokenizer has no EOS token" + (" that the model knows" if foreign else "") + "; "
            "name one in sampling.stop."
        )
    return sorted(ids)


def _ids(value: Any) -> list[int]:
    """Ids out of None, a number, or any container of numbers, tensors and arrays included."""
    if value is None:
        return []
    value = value.tolist() if hasattr(value, "tolist") else value
    return [int(token) for token in value] if isinstance(value, Iterable) else [int(value)]


def response_mask(ids: Tensor, stops: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mask [B, T], true up to and including the first stop token, and finished [B]: whether there was one."""
    is_stop = torch.isin(ids, torch.tensor(list(stops), device=ids.device))
    before = is_stop.int().cumsum(dim=1) - is_stop.int()
    return before == 0, is_stop.any(dim=1)
