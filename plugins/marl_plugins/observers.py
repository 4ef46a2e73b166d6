"""Built-in observers: who watches a run. Console lines, JSON-lines files, experiment trackers."""

from __future__ import annotations

import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, NonNegativeInt, PrivateAttr

from marl_core import Strategy, hookimpl, warn
from marl_plugins.lines import Lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from marl_core import Evaluation, Plan, RunResult, ScoredRollout, StepStats


class Console(Strategy):
    """One line a step: reward, KL, clip fraction, length, speed, time left; a progress bar on a terminal."""

    samples_every: NonNegativeInt = Field(
        default=10, description="Print a sampled response every this many steps; 0: never."
    )
    _screen: Any = PrivateAttr(None)

    @hookimpl
    def marl_run_start(self, plan: Plan, done: int) -> None:
        """Open the progress bar."""
        from marl_plugins.screen import Screen

        ppo, evaluates = plan.config.ppo, plan.config.eval.prompts is not None
        self._screen = Screen(ppo.steps, done, self.samples_every, epochs=ppo.epochs, evaluates=evaluates)

    @hookimpl
    def marl_step_end(self, stats: StepStats, scored: ScoredRollout) -> None:
        """One line."""
        self._screen.step(stats, scored)

    @hookimpl
    def marl_progress(self, phase: str, done: int, total: int) -> None:
        """The phase, in the bar."""
        if self._screen is not None:
            self._screen.progress(phase, done, total)

    @hookimpl
    def marl_evaluation_end(self, evaluation: Evaluation) -> None:
        """One line."""
        self._screen.evaluation(evaluation)

    @hookimpl
    def marl_run_end(self, result: RunResult) -> None:
        """Close the bar, say where things are."""
        self._screen.close(result)

    @hookimpl
    def marl_run_failed(self) -> None:
        """Close the bar: the cursor is shown again."""
        if self._screen is not None:
            self._screen.stop()


class JsonLines(Strategy):
    """steps.jsonl (one line a step) and samples.jsonl (sampled texts with scores) in the run folder."""

    samples: NonNegativeInt = Field(default=4, description="Responses written for each step.")
    tokens: bool = Field(
        default=True, description="Write each sampled token's end in its text and its KL too, for the report's colours."
    )
    _files: tuple[Lines, Lines] | None = PrivateAttr(None)
    _tokenizer: Any = PrivateAttr(None)

    @hookimpl
    def marl_run_start(self, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> None:
        """Remember the folder; without one nothing is written."""
        folder = Path(plan.config.run.folder).expanduser() if plan.config.run.folder else None
        self._files = (Lines(folder / "steps.jsonl"), Lines(folder / "samples.jsonl")) if folder else None
        self._tokenizer = tokenizer if self.tokens else None

    @hookimpl
    def marl_step_end(self, stats: StepStats, scored: ScoredRollout) -> None:
        """Append to both files."""
        from marl_plugins.samples import sample_rows

        line = {"step": stats.step, "time": round(time.time(), 1), **stats.metrics}
        self._append([line], sample_rows(stats, scored, self.samples, self._tokenizer) if self._files else [])

    @hookimpl
    def marl_run_end(self) -> None:
        """Write what still waits."""
        self._append([], [])

    @hookimpl
    def marl_run_failed(self) -> None:
        """Write what still waits."""
        self._append([], [])

    def _append(self, *parts: list[dict[str, Any]]) -> None:
        for lines, rows in zip(self._files or (), parts, strict=False):
            was_waiting = bool(lines.waiting)
            error = lines.append(rows)
            if error is not None and (not was_waiting or not rows):  # said once, and again at the end
                warn(
                    f"observers: json-lines can't write {lines.file} ({error.strerror or error}). Training goes on; "
                    f"{len(lines.waiting)} line(s) wait in memory and are written as soon as there is room, "
                    "and are lost if there is none by the end of the run. Make room on that disk."
                )


class Trackers(Strategy):
    """Experiment trackers through accelerate: tensorboard, wandb, mlflow, trackio and others."""

    to: list[str] = Field(min_length=1, description="Tracker names that accelerate knows, e.g. [tensorboard].")
    project: str = Field(default="marl", description="Project or experiment name.")
    settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Further settings of each tracker's start, e.g. {wandb: {mode: offline, name: first}}.",
    )
    _trackers: Any = PrivateAttr(None)

    @hookimpl
    def marl_check(self) -> Iterable[str]:
        """accelerate must be there, and each tracker's package."""
        if find_spec("accelerate") is None:
            yield "observers: trackers needs accelerate; install it with: pip install 'marl-core[trackers]'"
        else:
            from marl_plugins.trackers import problems

            yield from problems(self.to, self.settings)

    @hookimpl
    def marl_run_start(self, plan: Plan, done: int) -> None:
        """Open the trackers, and tell them the config."""
        from marl_plugins.trackers import OpenTrackers

        self._trackers = OpenTrackers(plan, self, done)

    @hookimpl
    def marl_step_end(self, stats: StepStats) -> None:
        """Log all numbers."""
        self._trackers.log(stats)

    @hookimpl
    def marl_evaluation_end(self, evaluation: Evaluation) -> None:
        """Log the held-out numbers under eval/."""
        self._trackers.evaluation(evaluation)

    @hookimpl
    def marl_run_end(self) -> None:
        """Close the trackers."""
        self._trackers.close()

    @hookimpl
    def marl_run_failed(self, error: BaseException) -> None:
        """Close the trackers, with the status failed in those that have one."""
        if self._trackers is not None:
            self._trackers.close(error)
