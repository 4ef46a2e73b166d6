"""The reward of the first run: short words."""

from typing import Any


def short_words(completions: list[str], **columns: Any) -> list[float]:
    """Minus the mean number of letters of a word; -10 for a text without words."""
    return [-sum(map(len, words)) / len(words) if (words := text.split()) else -10.0 for text in completions]
