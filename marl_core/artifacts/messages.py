"""Chat messages as rows of prompts and samples hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def message_text(message: Any) -> str:
    """What a chat message says, for people: its text; of a list of parts the texts, and the kind of any other, as `[image]`."""
    content = message.get("content", "") if isinstance(message, Mapping) else message
    if not isinstance(content, list):
        return str(content)
    parts = [part if isinstance(part, Mapping) else {"text": part} for part in content]
    return " ".join(str(part.get("text", f"[{part.get('type', 'part')}]")) for part in parts)


def continues_prompt(prompt: Any) -> bool:
    """Whether a response continues the prompt's own text: a plain text, or a chat whose last message is the assistant's."""
    if isinstance(prompt, str):
        return True
    last = prompt[-1] if len(prompt) else None
    return isinstance(last, Mapping) and last.get("role") == "assistant"
