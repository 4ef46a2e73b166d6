"""A mood as reward: VADER's compound score, or its opposite (Hutto & Gilbert, ICWSM 2014)."""

from functools import cache
from typing import Any


def mood(prompts: list[Any], completions: list[str], sign: float, **columns: Any) -> list[float]:
    """`sign` times the compound score of each completion, from -1 to 1."""
    return [sign * float(_analyzer().polarity_scores(text)["compound"]) for text in completions]


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
