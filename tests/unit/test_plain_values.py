"""Small things several rooms share: dotted keys, near matches, what a message says."""

from __future__ import annotations

from typing import Any

import pytest

from marl_core import flatten, message_text
from marl_core.errors import near_match


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"ppo": {"kl": {"coef": 0.1}, "steps": 2}}, {"ppo.kl.coef": 0.1, "ppo.steps": 2}),
        ({"reward": [{"use": "a"}, {"use": "b"}]}, {"reward.0.use": "a", "reward.1.use": "b"}),
        ({"stop": ["a", 3, None], "empty": [], "lora": {}}, {"stop": ["a", 3, None], "empty": [], "lora": {}}),
        ({"x": [[1], [2]]}, {"x.0": [1], "x.1": [2]}),
        (3, {"": 3}),
    ],
)
def test_dotted_keys(value: Any, found: dict[str, Any]) -> None:
    assert flatten(value) == found


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("learning-rate", "learning_rate"),
        (" LearningRate", "learning_rate"),
        ("disabled_adaptr", "disabled-adapter"),
        ("nothing", None),
        ("", None),
    ],
)
def test_near_matches_are_told_as_they_are_spelled(word: str, near: str | None) -> None:
    assert near_match(word, ["learning_rate", "disabled-adapter"]) == near


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "user", "content": "Hi."}, "Hi."),
        ({"content": [{"type": "text", "text": "What is"}, {"type": "image"}, "this?"]}, "What is [image] this?"),
        ({"role": "tool"}, ""),
        ("no message", "no message"),
    ],
)
def test_what_a_message_says(message: Any, text: str) -> None:
    assert message_text(message) == text
