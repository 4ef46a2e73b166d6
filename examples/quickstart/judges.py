"""An independent judge that nothing was trained on: VADER, a lexicon with rules (Hutto & Gilbert, ICWSM 2014).

Both functions follow TRL's reward-function convention and look at the completion only: the opening is given, so it is
not the policy's merit.
"""

from functools import cache
from typing import Any

POSITIVE = 0.05  # VADER's own threshold for "positive"


def vader(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """VADER's compound score of each completion, from -1 (most negative) to 1 (most positive)."""
    return [float(_analyzer().polarity_scores(_text(completion))["compound"]) for completion in completions]


def vader_positive(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """1.0 where VADER calls the completion positive (compound above 0.05), else 0.0; the mean is a share."""
    return [float(compound > POSITIVE) for compound in vader(prompts, completions)]


def _text(completion: Any) -> str:
    """Plain text, or the last message of a chat."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
