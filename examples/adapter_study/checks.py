"""The reward of the sums: is the last running total right? TRL's reward-function convention."""

from typing import Any


def last_total(prompts: list[Any], completions: list[str], answer: list[int], **columns: Any) -> list[float]:
    """1.0 where the last number of the response is the answer, 0.0 elsewhere; the mean is a share."""
    return [
        float(completion.strip().rpartition(",")[2] == str(right))
        for completion, right in zip(completions, answer, strict=True)
    ]
