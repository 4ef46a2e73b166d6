"""The data's columns as they are written beside samples: short, and without secrets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from marl_core.config.redact import redacted

MAX_COLUMNS = 12
MAX_CHARACTERS = 300
"""Of one value; a longer one ends with an ellipsis."""


def shown_row(row: Mapping[str, Any], prompt: Any = None) -> dict[str, Any]:
    """The columns of one row of data but the prompt, as plain JSON values: at most 12 of them, each at most 300 characters.

    `prompt` is what stands beside it already: a text, or chat messages. What isn't there (None, an empty text or list) is left out.
    """
    columns = {
        str(name): _short(value)
        for name, value in row.items()
        if value not in (None, "", [], {}) and not _is_prompt(value, prompt)
    }
    return dict(list(columns.items())[:MAX_COLUMNS])


def _is_prompt(value: Any, prompt: Any) -> bool:
    """Whether a column is what the prompt was made of: the same, or longer where the prompt was cut or was given a system message."""
    if isinstance(prompt, str) and isinstance(value, str):
        return bool(prompt) and value.endswith(prompt)
    return isinstance(prompt, list) and isinstance(value, list) and prompt[-len(value) :] == value


def _short(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(redacted(value), ensure_ascii=False, default=str)
    text = str(redacted(text))
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}…"
