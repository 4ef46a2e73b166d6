"""From a prompt to the tokens that the model reads: what the tokenizer puts first, the chat template, the cut of a long one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from math import inf
from typing import TYPE_CHECKING, Any

from marl_core.data.rendering import SYSTEM, Rendered
from marl_core.errors import DataError
from marl_core.ppo.texts import continues_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[Mapping[str, Any]]


class Encoder:
    """A tokenizer as it writes prompts. What it appends to every text (EOS, [SEP]) is left out: the response goes on there."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._first = _puts_first(tokenizer)

    def tokens(self, prompt: Rendered, as_text: bool, where: str) -> list[int]:
        """Tokens of a text, or of messages through the chat template. DataError naming the row when the template refuses it."""
        if isinstance(prompt.prompt, str):
            return self._text(prompt.prompt, as_text)
        return self._chat(prompt.prompt, prompt.options, where)

    def cut(self, prompt: Rendered, tokens: list[int], limit: int, where: str) -> list[int] | None:
        """`tokens` of a prompt brought down to `limit`, its oldest text taken away; None where what stays is too long alone.

        Of a text stays what the tokenizer puts first. Of a chat stays all that the template writes, the system message, and an
        answer that is gone on with: the messages' texts are taken away, the first one's first, each from its left.
        """
        if isinstance(prompt.prompt, str):
            head = self._head(tokens)
            return tokens[:head] + tokens[head + len(tokens) - limit :] if head < limit else None
        _, spoken = _without(prompt.prompt, inf)

        def shorter(letters: int) -> list[int]:
            messages, _ = _without(prompt.prompt, letters)
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
        """The prompt as the model reads it: some templates strip the blanks at the end of an answer that is gone on with, and
        a response then begins with its own.
        """
        messages = prompt.prompt
        if isinstance(messages, str) or not continues_prompt(messages):
            return messages
        *before, last = messages
        content = last.get("content")
        if not isinstance(content, str) or content == content.rstrip():
            return messages
        whole = str(self._render(messages, prompt.options, where, tokenize=False)).endswith(content)
        return messages if whole else [*before, {**last, "content": content.rstrip()}]

    def _text(self, text: str, as_text: bool) -> list[int]:
        """What spells a control token stays text `as_text`. A BOS that a text spells out is not given twice."""
        own = list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=as_text).input_ids)
        written = not as_text and self._first and own[: len(self._first)] == self._first
        return own if written else self._first + own

    def _head(self, tokens: list[int]) -> int:
        """How many tokens at the beginning are no text: the tokenizer's, or a BOS that was spelled out."""
        if self._first and tokens[: len(self._first)] == self._first:
            return len(self._first)
        return int(self._tokenizer.bos_token_id is not None and tokens[:1] == [self._tokenizer.bos_token_id])

    def _chat(self, messages: Messages, options: Mapping[str, Any], where: str) -> list[int]:
        """Tokens of messages."""
        return list(self._render(messages, options, where, return_dict=False))

    def _render(self, messages: Messages, options: Mapping[str, Any], where: str, **how: Any) -> Any:
        """As `apply_chat_template` gives it. Messages that end with the assistant's are gone on with; else its answer is opened."""
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
            beside = f"; given {', '.join(options)}" if options else ""
            raise DataError(
                f"data.prompts: the model's chat template can't render {where} (roles: {roles}{beside}): {error}. "
                "Mend its messages, leave out data.system_prompt if the template has no system role, name one of several templates "
                "in data.chat_template_kwargs as chat_template, or use plain texts."
            ) from error


def _puts_first(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer puts before every text: BOS, [CLS], GLM's [gMASK]<sop>."""
    for probe in ("a", "1", "."):
        framed = list(tokenizer(probe).input_ids)
        own = list(tokenizer(probe, add_special_tokens=False).input_ids)
        for start in range(len(framed) - len(own) + 1 if own else 0):
            if framed[start : start + len(own)] == own:
                return framed[:start]
    return []


def _without(messages: Messages, letters: float) -> tuple[Messages, int]:
    """The messages without their first `letters` letters, or as many of them as may go; and how many went.

    System messages stay, and an answer that is gone on with.
    """
    gone = 0

    def cut(text: str) -> str:
        nonlocal gone
        here = int(min(letters - gone, len(text)))
        gone += here
        return text[here:]

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
    found = [
        shortened(message) if place < last and message["role"] not in SYSTEM else message
        for place, message in enumerate(messages)
    ]
    return found, gone


def _has_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)
