"""What the observers of one run hear, from its beginning to its end, whichever end that is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from marl_core.bank.adapters import AdapterBank
from marl_core.plan.plan import Plan
from marl_core.ppo.types import Evaluation, RunResult

TOLD_EVERY_SECONDS = 0.2


class ObserverCalls:
    """Calls the observers of one Runner: each start that they are told of is followed by one end or one failure."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.began = False
        """Whether they were told of a start, and of no end since."""
        self._phase, self._told_at = "", 0.0

    def begin(self, step: int, tokenizer: object) -> None:
        """Tell that the run starts or goes on, with `step` steps done; nothing when that has been told."""
        if not self.began:
            self.began = True
            with self.until_the_end(lambda: step):
                self._plan.hooks.run_start(self._plan, step, tokenizer)  # type: ignore[arg-type]  # transformers' own

    def evaluation(self, evaluation: Evaluation, bank: AdapterBank, policy: str) -> None:
        """Tell the numbers of a held-out evaluation."""
        if self.began:
            self._plan.hooks.evaluation_end(evaluation, bank, policy)

    def progress(self, phase: str, done: int, total: int) -> None:
        """Tell how far a phase is: its beginning, its end, and between them now and then."""
        now = time.perf_counter()
        if self.began and (phase != self._phase or done in (0, total) or now - self._told_at >= TOLD_EVERY_SECONDS):
            self._phase, self._told_at = phase, now
            self._plan.hooks.progress(phase, done, total)

    def end(self, result: RunResult) -> None:
        """Tell that the run is complete."""
        self.began = False
        self._plan.hooks.run_end(result)

    @contextmanager
    def until_the_end(self, step: Callable[[], int]) -> Iterator[None]:
        """A block of the run: when an exception ends it, the observers are told of the failure, with the steps done (`step()`)."""
        try:
            yield
        except BaseException as error:
            if self.began:
                self.began = False
                self._plan.hooks.run_failed(step(), error)
            raise
