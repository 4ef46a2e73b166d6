"""A prompt as a person reads it on the console: the end of a text, or a chat as `role: content` lines, shortened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marl_core import message_text

MAX_CHARACTERS = 300
"""Characters shown of a text, or of each message."""
INDENT = "\n           "


def readable(prompt: Any) -> str:
    """A text's end, which the response goes on with; of a chat each message's beginning, and who answers."""
    if not isinstance(prompt, list):
        text = in_one_line(str(prompt))
        return text if len(text) <= MAX_CHARACTERS else f"... {text[-MAX_CHARACTERS:]}"
    continues = bool(prompt) and _role(prompt[-1]) == "assistant"
    lines = [
        f"{_role(message)}: {_beginning(message_text(message))}" for message in prompt[: -1 if continues else None]
    ]
    opening = readable(message_text(prompt[-1])) if continues else ""
    return INDENT + INDENT.join([*lines, f"assistant: {opening}"])


def in_one_line(text: str) -> str:
    """A text whose line breaks are seen and break no line."""
    return "⏎".join(text.splitlines()) + ("⏎" if text[-1:] in ("\n", "\r") else "")


def _role(message: Any) -> str:
    return str(message.get("role", "")) if isinstance(message, Mapping) else ""


def _beginning(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_CHARACTERS else f"{line[:MAX_CHARACTERS]} ..."
