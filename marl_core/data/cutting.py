"""A prompt with its oldest text taken away: from a chat's messages, from the columns of a template, never from what frames them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from marl_core.artifacts.messages import continues_prompt
from marl_core.config.prompt_template import fill
from marl_core.data.rendering import SYSTEM_ROLES, Rendered

Messages = list[Mapping[str, Any]]


class _Shears:
    """Takes characters off the left of one text after the other, until as many are gone as were asked for."""

    def __init__(self, letters: float) -> None:
        self._left = letters
        self.removed = 0

    def cut(self, text: str) -> str:
        count = int(min(self._left - self.removed, len(text)))
        self.removed += count
        return text[count:]


def without_letters(prompt: Rendered, letters: float) -> tuple[Rendered, int]:
    """The prompt without the first `letters` characters of its text, or as many as may be removed; and how many were.

    Of a filled template only the columns' text is removed, the first column's first; of a chat only what its messages say. System messages
    stay whole, and so does an answer that the response continues.
    """
    shears = _Shears(letters)
    if prompt.template is not None:
        values = {name: shears.cut(value) for name, value in prompt.values.items()}
        filled = fill(prompt.template, values)
        return replace(prompt, prompt=_refilled(prompt, filled), filled=filled, values=values), shears.removed
    messages: Messages = prompt.prompt
    last = len(messages) - 1 if continues_prompt(messages) else len(messages)
    shortened = [
        _shortened(message, shears) if index < last and message["role"] not in SYSTEM_ROLES else message
        for index, message in enumerate(messages)
    ]
    return replace(prompt, prompt=shortened), shears.removed


def _refilled(prompt: Rendered, filled: str) -> Any:
    """The filled template in the place of the longer one: the prompt itself, or the user message that holds it."""
    if isinstance(prompt.prompt, str):
        return filled
    return [*prompt.prompt[:-1], {**prompt.prompt[-1], "content": filled}]


def _shortened(message: Mapping[str, Any], shears: _Shears) -> Mapping[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": shears.cut(content)}
    if isinstance(content, list):
        return {
            **message,
            "content": [{**part, "text": shears.cut(part["text"])} if _has_text(part) else part for part in content],
        }
    return message


def _has_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)
