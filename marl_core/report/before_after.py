"""The held-out prompts with what the policy wrote to each of them, before training, after it and between."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marl_core.report.run_data import Line, RunData, evenly

MAX_EVALUATIONS = 8
"""Evaluations of one run whose texts the page holds; always the first and the last."""
MAX_PROMPTS = 40


@dataclass(frozen=True, slots=True)
class Column:
    """One evaluation of one run: its texts stand below each other."""

    run: int
    step: int
    shown: bool
    """Whether it is shown until somebody chooses otherwise."""

    @property
    def key(self) -> str:
        """Its name within the page."""
        return f"{self.run}-{self.step}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What was written to a prompt in one evaluation; `change` is its score minus that in the run's first one, None where there is none."""

    column: Column
    line: Line
    change: float | None


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A held-out prompt with its answers."""

    line: Line
    answers: Sequence[Answer]


@dataclass(frozen=True, slots=True)
class BeforeAfter:
    """All held-out prompts whose texts were kept (`eval.samples`)."""

    columns: Sequence[Column]
    prompts: Sequence[HeldOut]
    found: int
    """How many there are; `prompts` are at most MAX_PROMPTS of them."""

    @property
    def baseline(self) -> str:
        """What differences are to: the text of step 0 is the policy's before training, and a run may have kept none of it."""
        firsts = {column.run: column.step for column in reversed(self.columns)}
        return (
            "the score before training"
            if set(firsts.values()) == {0}
            else "the score in the first evaluation of its run"
        )

    @classmethod
    def of(cls, runs: Sequence[RunData]) -> BeforeAfter:
        """Of all runs: prompts that are the same stand together."""
        columns: list[Column] = []
        answers: dict[tuple[str, int], list[Answer]] = {}
        for index, run in enumerate(runs):
            kept = [line for line in run.evaluations if line.get("samples")]
            evaluations = [kept[position] for position in evenly(len(kept), MAX_EVALUATIONS)]
            before: Mapping[tuple[str, int], Line] = {}
            for position, evaluation in enumerate(evaluations):
                is_first, is_last = position == 0, position == len(evaluations) - 1
                column = Column(index, evaluation["step"], is_last or (is_first and index == 0))
                columns.append(column)
                written = dict(_by_prompt(evaluation["samples"]))
                before = before or written
                for key, line in written.items():
                    change = None if is_first else _change(before.get(key), line)
                    answers.setdefault(key, []).append(Answer(column, line, change))
        prompts = [HeldOut(found[0].line, found) for found in answers.values()]
        return cls(columns, prompts[:MAX_PROMPTS], len(prompts))


def _by_prompt(samples: Sequence[Any]) -> Iterator[tuple[tuple[str, int], Line]]:
    """Samples by their prompt, and by how often it came before: a prompt may stand in the data twice."""
    seen: Counter[str] = Counter()
    for line in samples:
        prompt = json.dumps(line.get("prompt"), sort_keys=True)
        yield (prompt, seen[prompt]), line
        seen[prompt] += 1


def _change(before: Line | None, after: Line) -> float | None:
    if before is None or before.get("score") is None or after.get("score") is None:
        return None
    return float(after["score"]) - float(before["score"])
