"""From a prompt to the tokens that the model reads: what the tokenizer puts first, the chat template, the cut of a long one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from math import inf
from typing import TYPE_CHECKING, Any

from marl_core.data.rendering import SYSTEM_ROLES, Rendered
from marl_core.errors import DataError
from marl_core.ppo.texts import continues_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[Mapping[str, Any]]


class Encoder:
    """Tokenizes prompts. What the tokenizer appends to every text (EOS, [SEP]) is left out, because the response goes on there."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._prefix = _prefix_tokens(tokenizer)

    def tokens(self, prompt: Rendered, as_text: bool, where: str) -> list[int]:
        """Tokens of a text, or of messages through the chat template. DataError naming the row when the template refuses it."""
        if isinstance(prompt.prompt, str):
            return self._text(prompt.prompt, as_text)
        return self._chat(prompt.prompt, prompt.options, where)

    def cut(self, prompt: Rendered, tokens: list[int], limit: int, where: str) -> list[int] | None:
        """`tokens` of a prompt cut to `limit` by removing its oldest text; None where what must stay is too long.

        A text keeps its prefix tokens (BOS) and loses its left end. A chat keeps what the template writes, its system message, and
        an answer that the response continues; the other messages lose their text, the first message first, each from its left.
        """
        if isinstance(prompt.prompt, str):
            head = self._head(tokens)
            return tokens[:head] + tokens[head + len(tokens) - limit :] if head < limit else None
        _, spoken = _without_letters(prompt.prompt, inf)

        def shorter(letters: int) -> list[int]:
            messages, _ = _without_letters(prompt.prompt, letters)
            return self._chat(messages, prompt.options, where)

        def fits(letters: int) -> bool:
            try:
                return len(shorter(letters)) <= limit
            except DataError:  # a template that wants every message to say something
                return False

        if spoken < 2 or not fits(spoken - 1):
            return None
        return shorter(bisect_left(range(spoken - 1), True, key=fits))

    def as_written(self, prompt: Rendered, where: str) -> Any:
        """The prompt as the model reads it.

        Some templates strip the blanks at the end of an answer that the response continues: then they are left out here too.
        """
        messages = prompt.prompt
        if isinstance(messages, str) or not continues_prompt(messages):
            return messages
        *before, last = messages
        content = last.get("content")
        if not isinstance(content, str) or content == content.rstrip():
            return messages
        unchanged = str(self._render(messages, prompt.options, where, tokenize=False)).endswith(content)
        return messages if unchanged else [*before, {**last, "content": content.rstrip()}]

    def _text(self, text: str, as_text: bool) -> list[int]:
        """What spells a control token stays text `as_text`. A BOS that a text spells out is not given twice."""
        text_ids = list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=as_text).input_ids)
        spelled = not as_text and self._prefix and text_ids[: len(self._prefix)] == self._prefix
        return text_ids if spelled else self._prefix + text_ids

    def _head(self, tokens: list[int]) -> int:
        """How many tokens at the beginning are no text: the tokenizer's, or a BOS that was spelled out."""
        if self._prefix and tokens[: len(self._prefix)] == self._prefix:
            return len(self._prefix)
        return int(self._tokenizer.bos_token_id is not None and tokens[:1] == [self._tokenizer.bos_token_id])

    def _chat(self, messages: Messages, options: Mapping[str, Any], where: str) -> list[int]:
        """Tokens of messages."""
        return list(self._render(messages, options, where, return_dict=False))

    def _render(self, messages: Messages, options: Mapping[str, Any], where: str, **how: Any) -> Any:
        """As `apply_chat_template` gives it. A last message of the assistant's is continued; else its answer is opened."""
        from jinja2 import TemplateError

        if self._tokenizer.chat_template is None and "chat_template" not in options:
            raise DataError(
                "data: the prompts are chat messages, but this model's tokenizer has no chat template. "
                "Use plain texts (data.prompt_template writes one), or give a tokenizer that has a template as model.tokenizer."
            )
        goes_on = continues_prompt(messages)
        render: Callable[..., Any] = self._tokenizer.apply_chat_template
        try:
            return render(
                messages,
                **options,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
                **how,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            option_names = f"; given {', '.join(options)}" if options else ""
            raise DataError(
                f"data.prompts: the model's chat template can't render {where} (roles: {roles}{option_names}): {error}. "
                "Mend its messages, leave out data.system_prompt if the template has no system role, name one of several templates "
                "in data.chat_template_kwargs as chat_template, or use plain texts."
            ) from error


def _prefix_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer puts before every text: BOS, [CLS], GLM's [gMASK]<sop>."""
    for probe in ("a", "1", "."):
        framed = list(tokenizer(probe).input_ids)
        text_ids = list(tokenizer(probe, add_special_tokens=False).input_ids)
        for start in range(len(framed) - len(text_ids) + 1 if text_ids else 0):
            if framed[start : start + len(text_ids)] == text_ids:
                return framed[:start]
    return []


def _without_letters(messages: Messages, letters: float) -> tuple[Messages, int]:
    """The messages without their first `letters` characters, or as many as may be removed; and how many were.

    System messages stay whole, and so does an answer that the response continues.
    """
    removed = 0

    def cut(text: str) -> str:
        nonlocal removed
        count = int(min(letters - removed, len(text)))
        removed += count
        return text[count:]

    def shortened(message: Mapping[str, Any]) -> Mapping[str, Any]:
        content = message.get("content")
        if isinstance(content, str):
            return {**message, "content": cut(content)}
        if isinstance(content, list):
            return {
                **message,
                "content": [{**part, "text": cut(part["text"])} if _has_text(part) else part for part in content],
            }
        return message

    last = len(messages) - 1 if continues_prompt(messages) else len(messages)
    shortened_messages = [
        shortened(message) if index < last and message["role"] not in SYSTEM_ROLES else message
        for index, message in enumerate(messages)
    ]
    return shortened_messages, removed


def _has_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)
