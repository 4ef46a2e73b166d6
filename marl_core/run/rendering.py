"""From a data row to what the model reads: column or template, system prompt, chat template, control tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from marl_core.config.prompt_template import columns_of, fill, pieces
from marl_core.config.run_config import DataPart
from marl_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt: a text or a list of messages; the texts in it that are the row's own, and those that the config wrote."""

    prompt: Any
    own: tuple[str, ...]
    written: tuple[str, ...] = ()
    whole: str = ""
    """The filled template: what a row's text and the config's make together."""

    @property
    def empty(self) -> bool:
        """Whether the row gave nothing but blanks."""
        return not any(text.strip() for text in self.own)


def render(data: DataPart, row: Row, source: str, index: int) -> Rendered:
    """A row's prompt as the config asks for it. DataError naming the row, counted from 1, when it can't be made."""
    where = f"row {index + 1} of {source}"
    if data.prompt_template is not None:
        names = columns_of(data.prompt_template)
        values = {name: _cell(row, name, where) for name in names}
        value: Any = fill(data.prompt_template, values)
        made = (tuple(values.values()), tuple(literal for literal, _ in pieces(data.prompt_template)), value)
    else:
        value = _value(row, data.field, "data.field", where)
        made = (tuple(_texts(value)), (), "")
    if isinstance(value, str) and data.chat:
        value = [{"role": "user", "content": value}]
    if data.system_prompt is not None:
        if isinstance(value, str):
            raise DataError(
                f"data.system_prompt: {where} is a text, and a system prompt belongs to a chat. Set data.chat: true to make texts "
                "user messages, or write the words into data.prompt_template."
            )
        if value[0]["role"] != "system":
            value = [{"role": "system", "content": data.system_prompt}, *value]
    return Rendered(value, *made)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Any, plain: bool = False) -> list[int]:
    """Tokens of a text, or of chat messages through the model's own chat template.

    With `plain`, what spells a control token in a text stays text. A BOS that a text spells out is not given twice. Messages
    that end with the assistant's are gone on with; else the template's opening of an answer is added.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt, split_special_tokens=plain).input_ids)
        twice = not plain and tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2
        return ids[1:] if twice else ids
    if tokenizer.chat_template is None:
        raise DataError(
            "data: the prompts are chat messages, but this model's tokenizer has no chat template. "
            "Use plain texts (data.prompt_template writes one), or give a tokenizer that has a template as model.tokenizer."
        )
    goes_on = prompt[-1]["role"] == "assistant"
    rendered: Any = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=not goes_on, continue_final_message=goes_on, return_dict=False
    )
    return list(rendered)


def encode_row(tokenizer: PreTrainedTokenizerBase, prompt: Any, plain: bool, source: str, index: int) -> list[int]:
    """`encode`; what a chat template refuses (roles out of order, no system role) is said with its row."""
    from jinja2 import TemplateError

    try:
        return encode(tokenizer, prompt, plain)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        if isinstance(prompt, str):
            raise
        roles = ", ".join(str(message["role"]) for message in prompt)
        raise DataError(
            f"data.prompts: the model's chat template can't render row {index + 1} of {source} (roles: {roles}): {error}. "
            "Mend its messages, leave out data.system_prompt if the template has no system role, or use plain texts."
        ) from error


class ControlTokens:
    """The tokens that mean something to the model beside their text: EOS, BOS, a template's marks."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        known = getattr(tokenizer, "added_tokens_decoder", {}).values()
        names = {str(token) for token in known if token.special} | set(tokenizer.all_special_tokens)
        self._pattern = re.compile(
            "|".join(re.escape(name) for name in sorted(names - {""}, key=len, reverse=True)) or r"(?!)"
        )

    def spelled_in(self, prompt: Rendered) -> str | None:
        """The first control token that a row spells out, alone or together with the text around it; None when there is none."""
        alone = [token for text in prompt.own for token in self._pattern.findall(text)]
        meant = [token for text in prompt.written for token in self._pattern.findall(text)]
        together = self._pattern.findall(prompt.whole)
        return next(iter(alone), None) or (next(iter(together)) if len(together) > len(meant) else None)


def _cell(row: Row, name: str, where: str) -> str:
    value = _value(row, name, "data.prompt_template", where, column=True)
    return value if isinstance(value, str) else str(value)


def _value(row: Row, name: str, key: str, where: str, column: bool = False) -> Any:
    if name not in row:
        raise DataError(f"{key}: {where} has no {name!r}; it has: {', '.join(map(str, row)) or 'nothing'}.")
    value = row[name]
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except (UnicodeEncodeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{key}: {where} holds half of a surrogate pair or no text at all ({error}), which no tokenizer "
            "can read. Mend the text."
        ) from error
    if isinstance(value, str) or (_is_cell(value) if column else _is_chat(value)):
        return value
    allowed = (
        "a template takes texts and numbers" if column else "a prompt is a text, or a list of {role, content} messages"
    )
    raise DataError(f"{key}: {where} has a {type(value).__name__} as {name!r}; {allowed}.")


def _is_cell(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in value)
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
