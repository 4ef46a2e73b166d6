"""Built-in observers: who watches a run. Console lines, JSON-lines files, experiment trackers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, NonNegativeInt, PrivateAttr

from marl_core import Strategy, hookimpl

if TYPE_CHECKING:
    from marl_core import Plan, RunResult, ScoredRollout, StepStats


class Console(Strategy):
    """One line a step: reward, KL, clip fraction, length, speed, time left; a progress bar on a terminal."""

    samples_every: NonNegativeInt = Field(10, description="Print a sampled response every this many steps; 0: never.")
    _screen: Any = PrivateAttr(None)

    @hookimpl
    def marl_run_start(self, plan: Plan, done: int) -> None:
        """Say what is held where, and open the progress bar."""
        from marl_plugins.screen import Screen

        self._screen = Screen(plan.config.ppo.steps, done, self.samples_every)

    @hookimpl
    def marl_step_end(self, stats: StepStats, scored: ScoredRollout) -> None:
        """One line."""
        self._screen.step(stats, scored)

    @hookimpl
    def marl_run_end(self, result: RunResult) -> None:
        """Close the bar, say where things are."""
        self._screen.close(result)


class JsonLines(Strategy):
    """steps.jsonl (one line a step) and samples.jsonl (sampled texts with scores) in the run folder."""

    samples: NonNegativeInt = Field(4, description="Responses written for each step.")
    _folder: Path | None = PrivateAttr(None)

    @hookimpl
    def marl_run_start(self, plan: Plan) -> None:
        """Remember the folder; without one nothing is written."""
        self._folder = Path(plan.config.run.folder).expanduser() if plan.config.run.folder else None

    @hookimpl
    def marl_step_end(self, stats: StepStats, scored: ScoredRollout) -> None:
        """Append to both files."""
        if self._folder is None:
            return
        _append(self._folder / "steps.jsonl", [{"step": stats.step, "time": round(time.time(), 1), **stats.metrics}])
        _append(self._folder / "samples.jsonl", sample_rows(stats, scored, self.samples))


class Trackers(Strategy):
    """Experiment trackers through accelerate: tensorboard, wandb, mlflow, trackio and others."""

    to: list[str] = Field(min_length=1, description="Tracker names that accelerate knows, e.g. [tensorboard].")
    project: str = Field("marl", description="Project or experiment name.")
    _accelerator: Any = PrivateAttr(None)

    @hookimpl
    def marl_check(self) -> Iterable[str]:
        """accelerate must be there."""
        if find_spec("accelerate") is None:
            yield "observers: trackers needs accelerate; install it with: pip install 'marl-core[trackers]'"

    @hookimpl
    def marl_run_start(self, plan: Plan) -> None:
        """Open the trackers."""
        from accelerate import Accelerator

        self._accelerator = Accelerator(
            log_with=list(self.to), project_dir=plan.config.run.folder or ".", cpu=plan.config.run.device == "cpu"
        )
        self._accelerator.init_trackers(self.project)

    @hookimpl
    def marl_step_end(self, stats: StepStats) -> None:
        """Log all numbers."""
        self._accelerator.log(dict(stats.metrics), step=stats.step)

    @hookimpl
    def marl_run_end(self) -> None:
        """Close the trackers."""
        self._accelerator.end_training()


def sample_rows(stats: StepStats, scored: ScoredRollout, count: int) -> list[dict[str, Any]]:
    """The first `count` responses of a step with their scores and KL."""
    rollout = scored.rollout
    raw = scored.raw_scores if scored.raw_scores is not None else scored.scores
    kl = (
        None
        if scored.ref_logprobs is None
        else (scored.logprobs - scored.ref_logprobs).masked_fill(~rollout.mask, 0.0).sum(dim=1)
    )
    return [
        {
            "step": stats.step,
            "prompt": rollout.prompts.texts[i] if rollout.prompts.texts else "",
            "response": rollout.texts[i],
            "score": round(float(raw[i]), 4),
            "parts": {name: round(float(part[i]), 4) for name, part in scored.parts.items() if part[i] == part[i]},
            "kl_nats": None if kl is None else round(float(kl[i]), 4),
            "finished": bool(rollout.finished[i]),
        }
        for i in range(min(count, len(rollout)))
    ]


def _append(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
