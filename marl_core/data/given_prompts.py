"""Prompts given in Python: texts, chats or rows, rendered and tokenized as the run's own data are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from marl_core.artifacts.rows import Row
from marl_core.bank.inputs import as_table
from marl_core.config.run_config import DataSection
from marl_core.data.encoding import Encoder
from marl_core.data.rendering import ControlTokens, is_chat, is_message, plain, render
from marl_core.errors import DataError, warn
from marl_core.ppo.types import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GivenPrompts: TypeAlias = "Sequence[str] | Sequence[Sequence[Mapping[str, Any]]] | Sequence[Mapping[str, Any]]"
"""Prompts as Python has them: texts, chats (lists of {role, content} messages), or rows of data (columns by name)."""
SOURCE = "the given prompts"
WHAT_PROMPTS_ARE = "Give a list of texts, of chats ([{role, content}, ...]) or of rows (columns by name); tokens go into Prompts.of(...)."


def encode_prompts(given: Any, data: DataSection | None, tokenizer: PreTrainedTokenizerBase, room: int) -> Prompts:
    """Texts, chats or rows as a batch: rendered as `data` says, or plainly where the config names no data.

    A text or a chat is a whole prompt: `data.field` and `data.prompt_template` are for rows. Nothing is dropped, so there is a prompt
    for each entry; DataError names the entry that can't be one, counted from 1. `room`: positions left for a prompt.
    """
    section = data or DataSection(prompts=SOURCE)
    whole = section.model_copy(update={"field": "prompt", "prompt_template": None})
    control, encoder = ControlTokens(tokenizer), Encoder(tokenizer)
    limit = min(section.max_prompt_tokens or room, room)
    as_text = section.on_control == "as-text"
    rows: list[Row] = []
    texts: list[Any] = []
    tokens: list[list[int]] = []
    seen: list[Any] = []
    cut_tokens: list[int] = []
    for index, entry in enumerate(_entries(given)):
        where = f"row {index + 1} of {SOURCE}"
        row, how = _row(entry, section, whole, where)
        prompt = render(how, row, SOURCE, index)
        spelled = None if section.on_control == "parse" else control.spelled_in(prompt)
        if spelled is not None and not (as_text and isinstance(prompt.prompt, str)):
            raise DataError(
                f"prompts: {where} spells the control token {spelled!r}. Give the chat itself, a list of {{role, content}} messages, which "
                "marl renders; or the tokens, as Prompts.of(...); or set data.on_control: parse."
            )
        ids = encoder.tokens(prompt, as_text, where)
        if not ids or prompt.empty:
            raise DataError(f"prompts: {where} is empty. Take it out.")
        text, whole_length = encoder.as_written(prompt, where), len(ids)
        if whole_length > limit:
            shorter = encoder.cut(prompt, ids, limit, as_text, where) if section.on_long == "truncate-left" else None
            if shorter is None:
                raise DataError(
                    f"prompts: {where} has {whole_length} tokens, and {limit} is the most (data.max_prompt_tokens, or what the model's "
                    "positions leave beside sampling.max_new_tokens). Shorten it, or set data.on_long: truncate-left."
                )
            prompt, ids = shorter
        rows.append(row)
        texts.append(text)
        tokens.append(ids)
        seen.append(encoder.as_written(prompt, where))
        cut_tokens.append(whole_length - len(ids))
    if not any(cut_tokens):
        return Prompts.of(tokens, tokenizer.pad_token_id, rows, texts)
    warn(
        f"prompts: {sum(map(bool, cut_tokens))} of {len(rows)} of {SOURCE} were cut to {limit} tokens, the oldest text is gone "
        "(data.on_long: truncate-left)."
    )
    return Prompts.of(tokens, tokenizer.pad_token_id, rows, texts, cut_tokens=cut_tokens, seen_texts=seen)


def _entries(given: Any) -> list[Any]:
    """What was given as a list with an entry for each prompt."""
    if isinstance(given, str | bytes):
        raise DataError(f"prompts: one {type(given).__name__} was given, not a list: write [prompt].")
    if isinstance(given, Mapping) and "input_ids" in given:
        raise DataError(
            "prompts: this is what a tokenizer gives. Give the texts themselves, or "
            "Prompts.of(encoded['input_ids'], tokenizer.pad_token_id, mask=encoded['attention_mask'])."
        )
    if isinstance(given, Mapping):
        lengths = [len(column) for column in given.values() if hasattr(column, "__len__")]
        given = as_table(given, max(lengths, default=0), "prompts")
    elif hasattr(given, "with_format") or hasattr(given, "columns"):  # a data set, a table of pandas
        given = as_table(given, len(given), "prompts")
    entries = list(given) if isinstance(given, Iterable) else None
    if not entries:
        raise DataError(
            f"prompts: {'an empty list' if entries == [] else repr(given)[:60]} was given. {WHAT_PROMPTS_ARE}"
        )
    if all(is_message(entry) for entry in entries):
        raise DataError("prompts: one chat was given, not a list of chats: write [chat].")
    return entries


def _row(entry: Any, section: DataSection, whole: DataSection, where: str) -> tuple[Row, DataSection]:
    """An entry as a data row, and how it is rendered."""
    if isinstance(entry, Mapping) and not is_message(entry):
        return entry, section
    value = plain(entry)
    if isinstance(value, str) or is_chat(value):
        return {"prompt": value}, whole
    raise DataError(f"prompts: {where} is {repr(value)[:60]}. {WHAT_PROMPTS_ARE}")
