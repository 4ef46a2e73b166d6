"""The prompts of a run: read and tokenized once, dealt out in a seeded order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from marl_core.artifacts.rows import Row
from marl_core.config.run_config import DataSection
from marl_core.data.reading import Reading, read_prompts
from marl_core.errors import together, warn
from marl_core.ppo.seeds import generator
from marl_core.ppo.types import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class PromptData:
    """All prompts of a run: rows, what the user wrote, and tokens."""

    rows: Sequence[Row]
    texts: Sequence[Any]
    tokens: Sequence[Sequence[int]]
    pad: int
    cut_tokens: Sequence[int] = ()
    """How many tokens of its oldest text each prompt lost because it was too long; empty when none lost any."""
    seen_texts: Sequence[Any] = ()
    """What the model reads of each prompt; empty when all are whole."""

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def load(
        cls,
        data: DataSection,
        tokenizer: PreTrainedTokenizerBase,
        room: int,
        vocabulary: int | None = None,
        asked_by: str = "data.prompts",
    ) -> PromptData:
        """Read, check and tokenize; DataError with row numbers for what can't be used, a MarlWarning for what was cut or dropped.

        `room`: positions left for a prompt; `vocabulary`: tokens that the model has embeddings for; `asked_by`: the key of the config
        that names the prompts.
        """
        return cls.of(read_prompts(data, tokenizer, room, vocabulary, asked_by=asked_by), tokenizer)

    @classmethod
    def of(cls, reading: Reading, tokenizer: PreTrainedTokenizerBase) -> PromptData:
        """From rows that were read with this tokenizer, as `load` says."""
        if reading.problems:
            alone = len(reading.problems) == 1
            raise reading.problems[0] if alone else together(reading.problems, "these prompts can't be used:")
        for remark in reading.remarks:
            warn(remark)
        usable = reading.usable
        is_cut = any(prompt.cut_tokens for prompt in usable)
        return cls(
            [prompt.row for prompt in usable],
            [prompt.text for prompt in usable],
            [prompt.tokens for prompt in usable],
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            [prompt.cut_tokens for prompt in usable] if is_cut else (),
            [prompt.seen for prompt in usable] if is_cut else (),
        )

    def take(self, indices: Sequence[int]) -> Prompts:
        """The prompts at these indices, as one batch."""
        return Prompts.of(
            [self.tokens[i] for i in indices],
            self.pad,
            [self.rows[i] for i in indices],
            [self.texts[i] for i in indices],
            cut_tokens=[self.cut_tokens[i] for i in indices] if self.cut_tokens else (),
            seen_texts=[self.seen_texts[i] for i in indices] if self.seen_texts else (),
        )

    def batch(self, step: int, count: int, seed: int, shuffle: bool = True) -> Prompts:
        """The `count` prompts of step `step` (0-based): each epoch in a new order that depends on the seed alone."""
        positions = [divmod(index, len(self)) for index in range(step * count, (step + 1) * count)]
        orders = {epoch: self._order(epoch, seed) for epoch, _ in positions} if shuffle else {}
        return self.take([orders[epoch][offset] if shuffle else offset for epoch, offset in positions])

    def _order(self, epoch: int, seed: int) -> list[int]:
        order: list[int] = torch.randperm(len(self), generator=generator(seed, "order", epoch)).tolist()
        return order
