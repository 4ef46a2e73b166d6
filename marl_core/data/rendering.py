"""From a data row to a prompt: column or template of columns, messages, system prompt, the chat template's options."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from marl_core.artifacts.rows import Row
from marl_core.config.prompt_template import NOT_A_TEMPLATES, columns_of, fill, pieces
from marl_core.config.run_config import DataSection
from marl_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM_ROLES = ("system", "developer")
"""Roles of messages that say how to answer; `developer` is what newer templates call it."""


TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns that a chat template reads, as TRL names them."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt, as text or list of messages; the texts in it that come from the row, and those that come from the config."""

    prompt: Any
    row_texts: tuple[str, ...]
    config_texts: tuple[str, ...] = ()
    filled: str = ""
    """The filled template: the row's texts within the config's; empty without a template."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template gets beside the messages."""
    empty: bool = False
    """Whether the row holds nothing but blanks."""
    template: str | None = None
    """The template of columns that was filled, with the `values` of its columns; None where the prompt is a column's own."""
    values: Mapping[str, str] = field(default_factory=dict)


class ColumnMissing(DataError):
    """A row lacks a column that the config names."""

    def __init__(self, message: str, key: str, column: str) -> None:
        super().__init__(message)
        self.key, self.column = key, column
        """The config's key that names it, and the column."""


def render(data: DataSection, row: Row, source: str, index: int, columnar: bool = False) -> Rendered:
    """A row's prompt as the config asks for it. DataError naming the row, counted from 1, when it can't be made.

    In a `columnar` source (parquet) every struct has the keys of all others: what is None there was never written.
    """
    where = f"row {index + 1} of {source}"
    options: dict[str, Any] = {}
    values: dict[str, str] = {}
    if data.prompt_template is not None:
        names = columns_of(data.prompt_template)
        values = {name: _cell(row, name, where) for name in names}
        value: Any = fill(data.prompt_template, values)
        row_texts, contents = tuple(values.values()), tuple(values.values())
        config_texts, filled = tuple(literal for literal, _ in pieces(data.prompt_template)), value
    else:
        value = _value(row, data.field, "data.field", where, columnar)
        if value is None:
            return Rendered("", (), empty=True)
        row_texts, config_texts, filled = tuple(_texts(value)), (), ""
        contents = (
            row_texts if isinstance(value, str) else tuple(text for m in value for text in _texts(m.get("content")))
        )
        contents = contents or ("(no text)",)  # calls of tools, say
    if isinstance(value, str) and data.chat:
        value = [{"role": "user", "content": value}]
    if isinstance(value, str):
        _refuse_chat_keys(data, where)
    else:
        if data.system_prompt is not None and value[0]["role"] not in SYSTEM_ROLES:
            value = [{"role": "system", "content": data.system_prompt}, *value]
        of_row = _options(row, where, columnar)
        row_texts += tuple(_texts(of_row))
        options = {**data.chat_template_kwargs, **of_row}
    empty = not any(text.strip() for text in contents)
    return Rendered(value, row_texts, config_texts, filled, options, empty, data.prompt_template, values)


def _refuse_chat_keys(data: DataSection, where: str) -> None:
    chat_keys = [
        (data.system_prompt, "data.system_prompt", "a system prompt belongs"),
        (data.chat_template_kwargs, "data.chat_template_kwargs", "a chat template's options belong"),
    ]
    for value, key, belongs in chat_keys:
        if value:
            raise DataError(
                f"{key}: {where} is a text, and {belongs} to a chat. Set data.chat: true to make texts "
                "user messages, or write the words into data.prompt_template."
            )


def _options(row: Row, where: str, columnar: bool) -> dict[str, Any]:
    """A row's own options of the chat template: columns `chat_template_kwargs` and `tools`, as TRL names them."""
    options = _structure(row, "chat_template_kwargs", where, columnar) or {}
    if isinstance(options, list):  # pairs: how parquet holds maps
        options = dict(options) if all(isinstance(pair, list) and len(pair) == 2 for pair in options) else None
    if not isinstance(options, Mapping):
        raise DataError(
            f"data: column 'chat_template_kwargs' of {where} holds no options of a chat template by name, such as "
            "{'enable_thinking': false}. Correct it, or rename the column."
        )
    reserved = sorted(options.keys() & NOT_A_TEMPLATES)
    if reserved:
        raise DataError(
            f"data: column 'chat_template_kwargs' of {where} gives {', '.join(reserved)}, which marl sets itself. Take it out."
        )
    tools = _structure(row, "tools", where, columnar)
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise DataError(
            f"data: column 'tools' of {where} holds no list of JSON schemas, which a chat template takes. Correct it, or rename the column."
        )
    return {**options, **({"tools": tools} if tools else {})}  # an empty list of tools is none


def _structure(row: Row, name: str, where: str, columnar: bool) -> Any:
    """A column's lists and dicts; a text (of a CSV, say) is read as JSON."""
    value = row.get(name)
    if isinstance(value, str) and value.strip():
        try:
            return json.loads(value)
        except ValueError as error:
            raise DataError(
                f"data: column {name!r} of {where} is a text that is no JSON ({error}). Correct it, or rename the column."
            ) from error
    return plain(value, columnar) if value is not None and not isinstance(value, str) else None


def plain(value: Any, columnar: bool = False) -> Any:
    """Dicts, lists and scalars, whatever held them: tuples, numpy arrays, a library's own mappings."""
    if isinstance(value, Mapping):
        present = {key: inner for key, inner in value.items() if not (columnar and inner is None)}
        return {str(key): plain(inner, columnar) for key, inner in present.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist(), columnar)
    return [plain(inner, columnar) for inner in value] if isinstance(value, list | tuple) else value


class ControlTokens:
    """The tokens that mean something to the model beside their text: EOS, BOS, a template's marks."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added_tokens = getattr(tokenizer, "added_tokens_decoder", {}).values()
        names = {str(token) for token in added_tokens if token.special} | set(tokenizer.all_special_tokens)
        self._pattern = re.compile(
            "|".join(re.escape(name) for name in sorted(names - {""}, key=len, reverse=True)) or r"(?!)"
        )

    def spelled_in(self, prompt: Rendered) -> str | None:
        """The first control token that a row spells out, alone or together with the text around it; None when there is none."""
        in_row = [token for text in prompt.row_texts for token in self._pattern.findall(text)]
        in_config = [token for text in prompt.config_texts for token in self._pattern.findall(text)]
        in_filled = self._pattern.findall(prompt.filled)
        return next(iter(in_row), None) or (next(iter(in_filled)) if len(in_filled) > len(in_config) else None)


def _cell(row: Row, name: str, where: str) -> str:
    value = _value(row, name, "data.prompt_template", where, column=True)
    return value if isinstance(value, str) else str(value)


def _value(row: Row, name: str, key: str, where: str, columnar: bool = False, column: bool = False) -> Any:
    if name not in row:
        columns = ", ".join(map(str, row)) or "nothing"
        raise ColumnMissing(f"{key}: {where} has no {name!r}; it has: {columns}.", key, name)
    cell = row[name]
    if cell is None and not column:  # a row without a prompt is an empty one, as data.on_empty says
        return None
    value = plain(cell, columnar)
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except (UnicodeEncodeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{key}: {where} holds half of a surrogate pair or no text at all ({error}), which no tokenizer "
            "can read. Correct the text."
        ) from error
    if isinstance(value, str) and not column:
        return _spelled_out(value)
    if isinstance(value, str) or (column and _is_cell(value)):
        return value
    if not column and is_chat(value):
        return [{name: part for name, part in message.items() if part is not None} for message in value]
    allowed = (
        "a template takes texts and numbers" if column else "a prompt is a text, or a list of {role, content} messages"
    )
    name_of_type = type(cell).__name__
    kind = "nothing (null)" if cell is None else f"a{'n' if name_of_type[0] in 'aeiou' else ''} {name_of_type}"
    raise DataError(f"{key}: {where} has {kind} as {name!r}; {allowed}.")


def _spelled_out(text: str) -> Any:
    """The messages that a text spells out as JSON, as a CSV file holds a chat; else the text."""
    if not text.lstrip().startswith("["):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return (
        [{name: part for name, part in message.items() if part is not None} for message in value]
        if is_chat(value)
        else text
    )


def _is_cell(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_chat(value: Any) -> bool:
    """Messages, each with a role and something said: a content, or calls of tools."""
    return isinstance(value, list) and bool(value) and all(is_message(entry) for entry in value)


def is_message(value: Any) -> bool:
    """Whether it is a chat message: it has a role, and says something."""
    return (
        isinstance(value, Mapping)
        and value.get("role") is not None
        and any(value.get(name) is not None for name in ("content", "tool_calls", "reasoning_content"))
    )


def _texts(value: Any) -> Iterator[str]:
    """Every text inside a prompt: contents, their parts, roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
