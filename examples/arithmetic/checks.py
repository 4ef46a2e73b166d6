"""A reward that can be checked: is the sum right? TRL's reward-function convention."""

from typing import Any


def correct(prompts: list[Any], completions: list[str], answer: list[int], **columns: Any) -> list[float]:
    """1.0 where the first line is the answer and nothing else, 0.0 elsewhere; the mean is a share."""
    lines = [completion.strip().partition("\n")[0].strip() for completion in completions]
    return [float(line == str(right)) for line, right in zip(lines, answer, strict=True)]
