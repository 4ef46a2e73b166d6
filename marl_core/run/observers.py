"""What the observers of one run hear, from its beginning to its end, whichever end that is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from marl_core.plan.plan import Plan
from marl_core.ppo.types import Evaluation, RunResult


class ObserverCalls:
    """The observers of one Runner: who was told of a beginning is told of an end, once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._began = False

    def begin(self, step: int, tokenizer: object) -> None:
        """The run begins after `step` steps, or goes on after an end was told."""
        if not self._began:
            self._began = True
            with self.until_the_end(lambda: step):
                self._plan.hooks.run_start(self._plan, step, tokenizer)  # type: ignore[arg-type]  # transformers' own

    def evaluation(self, evaluation: Evaluation) -> None:
        """Held-out numbers."""
        if self._began:
            self._plan.hooks.evaluation(evaluation)

    def end(self, result: RunResult) -> None:
        """The run is whole."""
        self._began = False
        self._plan.hooks.run_end(result)

    @contextmanager
    def until_the_end(self, step: Callable[[], int]) -> Iterator[None]:
        """A block of the run: when anything ends it before its end, the observers hear of that, and after which `step`."""
        try:
            yield
        except BaseException as error:
            if self._began:
                self._began = False
                self._plan.hooks.run_failed(step(), error)
            raise
