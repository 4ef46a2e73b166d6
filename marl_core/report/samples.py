"""Sampled responses as the page shows them: which rows, each prompt's turns, each token with its KL."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marl_core.artifacts.messages import message_text
from marl_core.report.run_data import Line, RunData

FULL_COLOR_NATS = 2.0  # nats: a token whose log-probs differ by this much is fully coloured


@dataclass(frozen=True, slots=True)
class Samples:
    """The rows of the table, each with its run's number, newest first."""

    rows: Sequence[tuple[int, Line]]
    written: int
    steps: Sequence[int]

    @classmethod
    def of(cls, runs: Sequence[RunData]) -> Samples:
        """Of all runs."""
        rows = [(index, line) for index, run in enumerate(runs) for line in run.samples[::-1]]
        steps = {line["step"] for run in runs for line in run.samples}
        return cls(rows, sum(run.samples_written for run in runs), sorted(steps))


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of a response: one token with its KL in nats, or text of which nothing is known (None)."""

    text: str
    nats: float | None = None
    special: bool = False

    @property
    def strength(self) -> float:
        """How strongly it is coloured, from 0 to 1."""
        return min(1.0, abs(self.nats or 0.0) / FULL_COLOR_NATS)


def turns(prompt: Any) -> list[tuple[str | None, str]]:
    """Chat messages as (role, text); anything else is one text without a role."""
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        return [(str(message.get("role", "")), message_text(message)) for message in prompt]
    return [(None, prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False))]


def tokens(line: Mapping[str, Any]) -> Iterator[Token]:
    """The response token by token, where the run wrote where tokens end and their KL."""
    text, ends, kl = str(line["response"]), line.get("token_ends"), line.get("token_kl")
    if not ends or not kl or len(ends) != len(kl):
        yield Token(text)
        return
    for start, end, nats in zip([0, *ends[:-1]], ends, kl, strict=True):
        shown = text[start:end] or ("⏎" if start == end == ends[-1] and line.get("finished") else "")
        if shown:
            yield Token(shown, float(nats), special=start == end)
    yield Token(text[ends[-1] :])
