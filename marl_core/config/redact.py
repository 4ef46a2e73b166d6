"""Secrets never leave the process: what looks like one is struck out of everything that is written or printed.

Struck out are the values of environment variables named like a secret, tokens by their well-known beginnings, and user
names, passwords and keys inside URLs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"
MIN_SECRET_CHARACTERS = 8
"""Characters below which an environment variable's value is no secret: it would strike out common words."""

_NAMED_LIKE_A_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)
_SECRET_PATTERNS = (
    (re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s@'\"]+@", re.IGNORECASE), rf"\1{REDACTED}@"),
    (
        re.compile(r"([?&][\w.-]*(?:token|key|secret|passw|signature|credential)[\w.-]*=)[^&\s'\"#]+", re.IGNORECASE),
        rf"\1{REDACTED}",
    ),
    (re.compile(r"\b((?:authorization:\s*)?bearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1{REDACTED}"),
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}|xox[abprs]-[\w-]{10,})"
        ),
        REDACTED,
    ),
)


def redact(text: str, env: Mapping[str, str] | None = None) -> str:
    """`text` with every secret struck out; `env` defaults to the process's environment."""
    environment = os.environ if env is None else env
    values = {
        value
        for name, value in environment.items()
        if _NAMED_LIKE_A_SECRET.search(name) and len(value) >= MIN_SECRET_CHARACTERS
    }
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, REDACTED)
    for pattern, replacement in _SECRET_PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redacted(value: Any) -> Any:
    """`redact` for every text inside plain dicts and lists; keys stay."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redacted(inner) for key, inner in value.items()}
    return [redacted(inner) for inner in value] if isinstance(value, list | tuple) else value
