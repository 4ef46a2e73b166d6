"""Where a run is while rewards are asked, and what they log beside scores: numbers by name, and a column for each response."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from marl_core.errors import PluginError, warn


@dataclass(frozen=True, slots=True)
class Logged:
    """What reward functions logged over one batch: each number's mean, and columns with an entry for each response."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RewardContext:
    """The step that rewards are asked for, counted from 0, of how many; passes over the data; what was logged so far."""

    step: int = 0
    steps: int = 1
    epoch: float = 0.0
    epochs: float = 1.0
    """Passes over the data of the whole run."""
    first: bool = True
    """Whether this is the process that writes."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def log_metric(self, name: str, value: Any) -> None:
        """A number of this batch; those of one name are averaged."""
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise PluginError(f"log_metric({name!r}, ...) takes a number, and got {value!r:.80}.") from error
        self.metrics.setdefault(str(name), []).append(number)

    def log_extra(self, column: str, values: Any) -> None:
        """Further values for the samples, one for each response of the batch."""
        self.columns.setdefault(str(column), []).extend(_plain(value) for value in values)

    def fresh(self) -> RewardContext:
        """The same place in the run, with nothing logged."""
        return replace(self, metrics={}, columns={})

    def part(self) -> dict[str, Any]:
        """What was logged, as JSON can hold it: one process's part of `Logged`."""
        sums = {name: [sum(values), len(values)] for name, values in self.metrics.items()}
        return {"sums": sums, "columns": self.columns}


def logged(parts: Sequence[Mapping[str, Any]], rows: Sequence[int]) -> Logged:
    """The parts of all processes, of which each had that many rows, one below the other."""
    metrics = {}
    for name in sorted({name for part in parts for name in part["sums"]}):
        found = [part["sums"][name] for part in parts if name in part["sums"]]
        metrics[name] = sum(total for total, _ in found) / sum(count for _, count in found)
    columns = {}
    for name in sorted({name for part in parts for name in part["columns"]}):
        given = [part["columns"].get(name, [None] * count) for part, count in zip(parts, rows, strict=True)]
        if [len(values) for values in given] == list(rows):
            columns[name] = [value for values in given for value in values]
        else:
            warn(
                f"reward: log_extra({name!r}, ...) gave {sum(map(len, given))} values for {sum(rows)} responses; give one for each. "
                "The column is left out of the samples."
            )
    return Logged(metrics, columns)


def _plain(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return json.loads(json.dumps(value, ensure_ascii=False, default=str))


_CURRENT: ContextVar[RewardContext | None] = ContextVar("marl_reward_context", default=None)


def reward_context() -> RewardContext:
    """Where the run is that asks for rewards; a blank one outside of a run, whose logs go nowhere."""
    return _CURRENT.get() or RewardContext()


@contextmanager
def asking(context: RewardContext) -> Iterator[RewardContext]:
    """Rewards asked inside are asked for this step, and log here."""
    before = _CURRENT.set(context)
    try:
        yield context
    finally:
        _CURRENT.reset(before)
