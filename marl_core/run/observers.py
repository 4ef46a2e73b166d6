"""What the observers of one run hear, from its beginning to its end, whichever end that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from marl_core.ppo.types import Evaluation, RunResult

if TYPE_CHECKING:
    from marl_core.run.runner import Runner


class Audience:
    """The observers of one Runner: who was told of a beginning is told of an end, once."""

    def __init__(self) -> None:
        self._began = False

    def begin(self, runner: Runner) -> None:
        """The run begins, or goes on after an end was told."""
        if not self._began:
            self._began = True
            with self.until_the_end(runner):
                runner.plan.hooks.run_start(runner.plan, runner.done, runner.bank.tokenizer)

    def evaluation(self, runner: Runner, found: Evaluation) -> None:
        """Held-out numbers."""
        if self._began:
            runner.plan.hooks.evaluation(found)

    def end(self, runner: Runner, result: RunResult) -> None:
        """The run is whole."""
        self._began = False
        runner.plan.hooks.run_end(result)

    @contextmanager
    def until_the_end(self, runner: Runner) -> Iterator[None]:
        """A block of the run: when anything ends it before its end, the observers hear of that."""
        try:
            yield
        except BaseException as error:
            if self._began:
                self._began = False
                runner.plan.hooks.run_failed(runner.done, error)
            raise
