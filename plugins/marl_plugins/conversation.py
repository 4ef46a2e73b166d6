"""A chat with its answer: what stands before the answer, and the answer as one message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]


def answered(prompt: Sequence[Message], response: str) -> tuple[list[Message], Message]:
    """The messages before the answer, and the answer.

    A prompt that ends with an assistant's message is continued: that message's text and the response are one answer, as TRL's
    GRPO joins them.
    """
    before = list(prompt)
    if not before or before[-1].get("role") != "assistant":
        return before, {"role": "assistant", "content": response}
    *before, opening = before
    content = opening.get("content") or ""
    if isinstance(content, str):
        return before, {**opening, "content": content + response}
    *parts, last_part = content
    if isinstance(last_part, Mapping) and "text" in last_part:
        return before, {**opening, "content": [*parts, {**last_part, "text": last_part["text"] + response}]}
    return before, {**opening, "content": [*content, {"type": "text", "text": response}]}


def text_of(message: Message) -> str:
    """A message's text; of parts the texts one after the other."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content)
