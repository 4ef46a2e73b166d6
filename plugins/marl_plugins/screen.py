"""What the console observer draws: a progress bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import atexit
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from marl_plugins.prompt_text import in_one_line, readable

if TYPE_CHECKING:
    from marl_core import Evaluation, RunResult, ScoredRollout, StepStats

SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 24
HEADER = "  step   reward      KL   clip  entropy  length   EOS   tok/s    left"


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """All values in at most `width` characters, from the lowest to the highest; neighbours are averaged."""
    finite = [value for value in values if math.isfinite(value)]
    count = min(width, len(finite))
    cuts = [round(index * len(finite) / count) for index in range(count + 1)] if count else []
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    return "".join(SPARKS[round((mean - low) / (high - low) * 7) if high > low else 3] for mean in means)


def phase_text(phase: str, done: int, total: int, epochs: int) -> str:
    """A phase as the bar names it: what is being counted, from 1; nothing is counted while nothing, or one thing, can be."""
    if phase != "update":
        return f"{phase} {done}/{total}" if done and total > 1 else phase
    minibatches = max(1, total // epochs)
    epoch, minibatch = divmod(min(done, total - 1), minibatches)
    return f"update: epoch {epoch + 1}/{epochs}, minibatch {minibatch + 1}/{minibatches}"


def minutes(seconds: float | None) -> str:
    """A time that is left as the lines and the bar write it; None: not known yet."""
    return "-:--" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02}"


class TimeLeft(ProgressColumn):
    """The time left as the last step's line had it, less what has gone by since: rich's own forgets steps of over half a minute."""

    def render(self, task: Task) -> Text:
        """Of a task whose field `ends` is on the clock of time.perf_counter; None before the first step."""
        ends = task.fields["ends"]
        return Text(minutes(None if ends is None else max(0.0, ends - time.perf_counter())), "progress.remaining")


class Screen:
    """One run's output: a line a step, and on a terminal a bar below them with the rewards so far as a sparkline."""

    def __init__(self, steps: int, done: int, samples_every: int, *, epochs: int = 1, evaluates: bool = False) -> None:
        """`epochs` of each update; `evaluates`: whether an evaluation follows the last step."""
        self._steps, self._samples_every = steps, samples_every
        self._epochs, self._evaluates = epochs, evaluates
        self._console = Console()
        self._rewards: list[float] = []
        self._finished = False
        self._headed = (
            False  # the header waits for the first step: the roles and the pre-flight check are told in between
        )
        self._start, self._first = time.perf_counter(), done
        self._bar = Progress(
            TextColumn("PPO"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeft(),
            TextColumn("[dim]reward[/dim] {task.fields[reward]}"),
            TextColumn("[dim]{task.fields[phase]}[/dim]"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("ppo", total=self._steps, completed=done, reward="", phase="", ends=None)
        self._bar.start()
        atexit.register(self._bar.stop)  # a loop of one's own may end without a word, and the bar hides the cursor

    def step(self, stats: StepStats, scored: ScoredRollout) -> None:
        """The step's line, and a sample now and then."""
        m = stats.metrics
        spent = (time.perf_counter() - self._start) / max(1, stats.step - self._first)
        left = spent * (self._steps - stats.step)
        line = (
            f"{stats.step:>6} {m['objective/scores']:>8.3f} {m['objective/kl']:>7.2f} {m['policy/clipfrac']:>6.3f}"
            f" {m['objective/entropy']:>8.2f}"
            f" {m['tokens/mean_length']:>7.1f} {m['tokens/finished']:>5.0%}"
            f" {m['perf/tokens_per_second']:>7.0f} {minutes(left):>7}"
        )
        if not self._headed:
            self._bar.console.print(HEADER, style="bold")
            self._headed = True
        self._bar.console.print(line, highlight=False)
        if self._samples_every and stats.step % self._samples_every == 0:
            prompt = readable(scored.rollout.prompts.seen(0))
            shown = f"[dim]{escape(prompt)}[/dim]{escape(in_one_line(scored.rollout.texts[0]))}"
            cut = scored.rollout.prompts.cut_of(0)
            mark = f", cut: {cut} token{'' if cut == 1 else 's'} of the oldest text" if cut else ""
            self._bar.console.print(
                f"         [dim]sample ({float(scored.scores[0]):.2f}{mark}):[/dim] {shown}",
                highlight=False,
                soft_wrap=not self._console.is_terminal,
            )
        self._rewards.append(m["objective/scores"])
        shown = f"[cyan]{sparkline(self._rewards)}[/cyan] {m['objective/scores']:.3f}"
        self._bar.update(self._task, completed=stats.step, reward=shown, phase="", ends=time.perf_counter() + left)
        self._finished = stats.step >= self._steps
        if self._finished and not self._evaluates:
            self.stop()

    def progress(self, phase: str, done: int, total: int) -> None:
        """The phase that the step is in, beside the bar; nothing where there is no bar."""
        if not self._bar.disable:
            self._bar.update(self._task, phase=escape(phase_text(phase, done, total, self._epochs)))

    def evaluation(self, evaluation: Evaluation) -> None:
        """A line with the held-out numbers."""
        reward = "" if math.isnan(evaluation.reward) else f"reward {evaluation.reward:.3f}, "
        line = f"held out at step {evaluation.step}: {reward}KL {evaluation.kl:.2f} nats per response"
        self._console.print(line, highlight=False)
        self._bar.update(self._task, phase="")
        if self._finished:
            self.stop()

    def stop(self) -> None:
        """The bar's end, at its last state; it may be asked twice."""
        self._bar.stop()
        atexit.unregister(self._bar.stop)

    def close(self, result: RunResult) -> None:
        """The bar's end and where the results are."""
        self.stop()
        if result.stopped is not None:
            self._console.print(
                f"stopped after step {result.steps} of {self._steps}: {result.stopped}",
                highlight=False,
                markup=False,
                soft_wrap=not self._console.is_terminal,
            )
        if result.before and result.after:
            b, a = result.before, result.after
            reward = "" if math.isnan(a.reward) else f"reward {b.reward:.3f} -> {a.reward:.3f}, "
            self._console.print(
                f"held out: {reward}KL {b.kl:.2f} -> {a.kl:.2f} nats per response",
                highlight=False,
            )
        if result.folder:
            self._console.print(
                f"run folder: {result.folder} (final adapter in {result.folder}/final/policy)",
                highlight=False,
                soft_wrap=True,
            )
