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
    """Where a run is when it asks for rewards: step, counted from 0, and epoch, each with its total; and what was logged so far."""

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
        """Log a number of this batch; those of one name are averaged. PluginError for anything but a number."""
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise PluginError(f"log_metric({name!r}, ...) takes a number, and got {value!r:.80}.") from error
        self.metrics.setdefault(str(name), []).append(number)

    def log_extra(self, column: str, values: Any) -> None:
        """Log a column of values for the samples, one for each response of the batch."""
        self.columns.setdefault(str(column), []).extend(_plain(value) for value in values)

    def fresh(self) -> RewardContext:
        """The same step and epoch, with nothing logged."""
        return replace(self, metrics={}, columns={})

    def part(self) -> dict[str, Any]:
        """What this process logged, as JSON can hold it; `logged` merges the parts of all processes."""
        sums = {name: [sum(values), len(values)] for name, values in self.metrics.items()}
        return {"sums": sums, "columns": self.columns}


def logged(parts: Sequence[Mapping[str, Any]], rows: Sequence[int]) -> Logged:
    """What all processes logged: their `parts` merged in the order of the ranks. `rows`: responses that each process had."""
    metrics = {}
    for name in sorted({name for part in parts for name in part["sums"]}):
        sums = [part["sums"][name] for part in parts if name in part["sums"]]
        metrics[name] = sum(total for total, _ in sums) / sum(count for _, count in sums)
    columns = {}
    for name in sorted({name for part in parts for name in part["columns"]}):
        part_columns = [part["columns"].get(name, [None] * count) for part, count in zip(parts, rows, strict=True)]
        if [len(values) for values in part_columns] == list(rows):
            columns[name] = [value for values in part_columns for value in values]
        else:
            warn(
                f"reward: log_extra({name!r}, ...) gave {sum(map(len, part_columns))} values for {sum(rows)} responses; give one for each. "
                "The column is left out of the samples."
            )
    return Logged(metrics, columns)


def _plain(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return json.loads(json.dumps(value, ensure_ascii=False, default=str))


_CURRENT: ContextVar[RewardContext | None] = ContextVar("marl_reward_context", default=None)


def reward_context() -> RewardContext:
    """The context of the run that asks for rewards; outside of a run a blank one, whose logs go nowhere."""
    return _CURRENT.get() or RewardContext()


@contextmanager
def asking(context: RewardContext) -> Iterator[RewardContext]:
    """A block in which `reward_context` gives this context, so that reward functions called inside log into it."""
    token = _CURRENT.set(context)
    try:
        yield context
    finally:
        _CURRENT.reset(token)
