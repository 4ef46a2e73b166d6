"""A reward for long words, or for short ones."""

from typing import Any


def letters(prompts: list[Any], completions: list[str], sign: float, **columns: Any) -> list[float]:
    """`sign` times the mean number of letters of a word, less 4.5, which is about what English has; 0 without words."""
    return [sign * (mean - 4.5) if (mean := mean_letters(text)) else 0.0 for text in completions]


def mean_letters(text: str) -> float:
    """Letters per word; what isn't a word doesn't count."""
    lengths = [len(word.strip(",.;:!?'\"")) for word in text.split() if word.strip(",.;:!?'\"").isalpha()]
    return sum(lengths) / max(1, len(lengths))
