"""Prompts given in Python: texts, chats or rows, rendered and tokenized as the run's own data are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from marl_core.artifacts.rows import Row
from marl_core.bank.inputs import as_table
from marl_core.config.run_config import DataSection
from marl_core.data.one_prompt import PromptReader, Unusable, UsablePrompt
from marl_core.data.rendering import is_chat, is_message, plain, render
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
    reader = PromptReader(section, tokenizer, room)
    read: list[UsablePrompt] = []
    for index, entry in enumerate(_entries(given)):
        where = f"row {index + 1} of {SOURCE}"
        row, how = _row(entry, section, whole, where)
        found = reader.read(row, index, render(how, row, SOURCE, index), where)
        if isinstance(found, Unusable):
            raise DataError(f"prompts: {where} {_told(found, reader.limit)}")
        read.append(found)
    tokens, pad = [prompt.tokens for prompt in read], tokenizer.pad_token_id
    rows, texts = [prompt.row for prompt in read], [prompt.text for prompt in read]
    cut = [prompt.cut_tokens for prompt in read]
    if not any(cut):
        return Prompts.of(tokens, pad, rows, texts)
    warn(
        f"prompts: {sum(map(bool, cut))} of {len(rows)} of {SOURCE} were cut to {reader.limit} tokens, the oldest text is gone "
        "(data.on_long: truncate-left)."
    )
    return Prompts.of(tokens, pad, rows, texts, cut_tokens=cut, seen_texts=[prompt.seen for prompt in read])


def _told(found: Unusable, limit: int) -> str:
    """Why a prompt can't be used, and what to do: nothing is dropped here, so there are other ways out than for rows of a file."""
    if found.fault == "empty":
        return "is empty. Take it out."
    if found.fault == "spelled":
        return (
            f"spells the control token {found.token!r}. Give the chat itself, a list of {{role, content}} messages, which marl renders; or "
            "the tokens, as Prompts.of(...); or set data.on_control: parse."
        )
    return (
        f"has {found.length} tokens, and {limit} is the most (data.max_prompt_tokens, or what the model's positions leave beside "
        "sampling.max_new_tokens). Shorten it, or set data.on_long: truncate-left."
    )


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
