"""Prompts from a file or a data set: read, checked row by row, tokenized once, dealt out in a seeded order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from marl_core.artifacts.rows import Row, is_columnar, read_rows
from marl_core.config.prompt_template import columns_of
from marl_core.config.run_config import DataSection
from marl_core.data.encoding import Encoder
from marl_core.data.rendering import TEMPLATE_COLUMNS, ControlTokens, render
from marl_core.errors import DataError, warn
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
    cut: Sequence[int] = ()
    """Indices of the prompts that were too long and lost their oldest text."""

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def load(
        cls, data: DataSection, tokenizer: PreTrainedTokenizerBase, room: int, vocabulary: int | None = None
    ) -> PromptData:
        """Read, check and tokenize; DataError with row numbers for what can't be used.

        `room`: positions left for a prompt; `vocabulary`: tokens that the model has embeddings for.
        """
        limit = min(data.max_prompt_tokens or room, room)
        rows = read_rows(data.prompts, data.split, data.subset, data.revision)
        columnar = is_columnar(data.prompts)
        prompts = [render(data, row, data.prompts, index, columnar) for index, row in enumerate(rows)]
        usable: list[tuple[Row, Any, list[int]]] = []
        cut: list[int] = []
        long: list[int] = []
        empty: list[int] = []
        control, encoder = ControlTokens(tokenizer), Encoder(tokenizer)
        spelled: dict[int, str] = {}
        for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            token = control.spelled_in(prompt)
            if token is not None and data.on_control != "parse":
                as_text = data.on_control == "as-text" and isinstance(prompt.prompt, str)  # a chat template can't
                if not as_text:
                    spelled[index] = token
                    continue
            where = f"row {index + 1} of {data.prompts}"
            tokens: list[int] | None = encoder.tokens(prompt, data.on_control == "as-text", where)
            if not tokens or prompt.empty:
                empty.append(index)
                continue
            if len(tokens) > limit:
                tokens = encoder.cut(prompt, tokens, limit, where) if data.on_long == "truncate-left" else None
                if tokens is None:
                    long.append(index)
                    continue
                cut.append(len(usable))
            _require_embeddings(tokens, vocabulary, where)
            usable.append((row, encoder.as_written(prompt, where), tokens))
        _refuse_rows(empty, data.on_empty == "error", "are empty", "data.on_empty: drop", data.prompts)
        _refuse_rows(
            list(spelled),
            data.on_control != "drop",
            f"hold control tokens such as {next(iter(spelled.values()), '')!r}",
            "data.on_control: parse where they are meant (a template written out), drop, or (for texts) as-text",
            data.prompts,
        )
        _refuse_rows(
            long,
            data.on_long != "drop",
            f"exceed {limit} tokens"
            + (", even without the text that may be cut away" if data.on_long == "truncate-left" else ""),
            "a larger data.max_prompt_tokens, or data.on_long: drop"
            + (" or truncate-left" if data.on_long == "error" else ""),
            data.prompts,
        )
        if not usable:
            raise DataError(
                f"data.prompts: {data.prompts} holds no usable prompt. Each row needs a non-empty {_prompt_columns(data)}."
            )
        _warn_of_unread_columns(usable, data.prompts)
        if cut:
            warn(
                f"data.prompts: {len(cut)} of {len(usable)} prompts of {data.prompts} were longer than {limit} tokens and lost their "
                "oldest text (data.on_long: truncate-left)."
            )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        return cls([k[0] for k in usable], [k[1] for k in usable], [k[2] for k in usable], pad, cut)

    def take(self, indices: Sequence[int]) -> Prompts:
        """The prompts at these indices, as one batch."""
        return Prompts.of(
            [self.tokens[i] for i in indices],
            self.pad,
            [self.rows[i] for i in indices],
            [self.texts[i] for i in indices],
        )

    def batch(self, step: int, count: int, seed: int, shuffle: bool = True) -> Prompts:
        """The `count` prompts of step `step` (0-based): each epoch in a new order that depends on the seed alone."""
        positions = [divmod(index, len(self)) for index in range(step * count, (step + 1) * count)]
        orders = {epoch: self._order(epoch, seed) for epoch, _ in positions} if shuffle else {}
        return self.take([orders[epoch][offset] if shuffle else offset for epoch, offset in positions])

    def _order(self, epoch: int, seed: int) -> list[int]:
        order: list[int] = torch.randperm(len(self), generator=generator(seed, "order", epoch)).tolist()
        return order


def _require_embeddings(tokens: Sequence[int], vocabulary: int | None, where: str) -> None:
    """DataError when the model has no embedding for one of the tokens."""
    if vocabulary is not None and max(tokens) >= vocabulary:
        raise DataError(
            f"data.prompts: {where} holds token {max(tokens)}, and the model has embeddings for {vocabulary} tokens only: the tokenizer "
            "knows tokens that were added after the model. Give the model's own as model.tokenizer, or a model that has them."
        )


def _warn_of_unread_columns(usable: Sequence[tuple[Row, Any, list[int]]], source: str) -> None:
    """A MarlWarning when rows of plain texts have columns that only chat templates read."""
    for name in TEMPLATE_COLUMNS:
        count = sum(isinstance(prompt, str) and row.get(name) not in (None, "", [], {}) for row, prompt, _ in usable)
        if count:
            warn(
                f"data.prompts: {count} of {len(usable)} prompts of {source} are texts and have a column {name!r}, which only a chat's "
                "template reads: the model doesn't see it. Set data.chat: true to make texts user messages."
            )


def _prompt_columns(data: DataSection) -> str:
    return (
        repr(data.field) if data.prompt_template is None else " or ".join(map(repr, columns_of(data.prompt_template)))
    )


def _refuse_rows(rows: list[int], refuse: bool, what: str, way_out: str, source: str) -> None:
    if rows and refuse:
        numbers = ", ".join(str(row + 1) for row in rows[:5])
        raise DataError(
            f"data.prompts: {len(rows)} prompts of {source} {what} (rows {numbers}). Mend them, or set {way_out}."
        )
