"""From a prompt to the tokens that the model reads: what the tokenizer puts first, the chat template, the cut of a long one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any

from marl_core.artifacts.messages import continues_prompt
from marl_core.data.cutting import Messages, without_letters
from marl_core.data.rendering import Rendered
from marl_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    def cut(
        self, prompt: Rendered, tokens: list[int], limit: int, as_text: bool, where: str
    ) -> tuple[Rendered, list[int]] | None:
        """A prompt of more than `limit` tokens without its oldest text, and its tokens; None where what must stay is too long.

        A text keeps its prefix tokens (BOS) and loses its left end. A chat keeps what the template writes, its system message, and
        an answer that the response continues; the other messages lose their text, the first message first, each from its left. A
        template of columns keeps its own words in the same way.
        """
        if isinstance(prompt.prompt, str) and prompt.template is None:
            return self._without_first_tokens(prompt, tokens, limit)
        _, removable = without_letters(prompt, inf)

        def shorter(letters: int) -> tuple[Rendered, list[int]]:
            shortened, _ = without_letters(prompt, letters)
            return shortened, self.tokens(shortened, as_text, where)

        def fits(letters: int) -> bool:
            try:
                return len(shorter(letters)[1]) <= limit
            except DataError:  # a template that wants every message to say something
                return False

        if removable < 2 or not fits(removable - 1):
            return None
        return shorter(bisect_left(range(removable - 1), True, key=fits))

    def _without_first_tokens(
        self, prompt: Rendered, tokens: list[int], limit: int
    ) -> tuple[Rendered, list[int]] | None:
        head = self._head(tokens)
        if head >= limit:
            return None
        rest = tokens[head + len(tokens) - limit :]
        spelled = tokens[:head] != self._prefix  # a BOS that belongs to the text
        seen = str(self._tokenizer.decode(tokens[:head] + rest if spelled else rest))
        return replace(prompt, prompt=seen), tokens[:head] + rest

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
                "Correct its messages, leave out data.system_prompt if the template has no system role, name one of several templates "
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
