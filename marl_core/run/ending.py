"""How one run ends, whichever end that is, and who hears of it: its observers, its folder and the folder's page."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from marl_core.errors import warn
from marl_core.ppo.ranks import Ranks
from marl_core.registry.hooks import Hooks
from marl_core.report.live import LiveReport
from marl_core.run.observers import ObserverCalls
from marl_core.store.ended import How, how_it_ended
from marl_core.store.folder import RunFolder


class Ending:
    """Of one Runner: who asked it to stop, and what is written and told when it ends."""

    def __init__(self, observers: ObserverCalls, folder: RunFolder | None, hooks: Hooks, ranks: Ranks) -> None:
        self._observers, self._folder, self._hooks, self._ranks = observers, folder, hooks, ranks
        self._page = LiveReport(folder.path) if folder is not None else None
        self._asked: str | None = None
        self._unsaved = [0]
        weakref.finalize(self, _tell_unsaved, None if folder is None else str(folder.path), self._unsaved)
        self.stopped: str | None = None
        """Why the run ended before its last step, where somebody asked it to."""

    @property
    def unsaved(self) -> int:
        """Steps since the last checkpoint. If some are left when nobody holds the Runner any more, a warning says so."""
        return self._unsaved[0]

    @unsaved.setter
    def unsaved(self, steps: int) -> None:
        self._unsaved[0] = steps

    def ask(self, reason: str) -> None:
        """End the run after the step it is in; the first reason counts."""
        self._asked = self._asked or reason

    def was_asked(self) -> bool:
        """Whether somebody asked the run to stop: a strategy, or code that has the Runner. The same on all ranks."""
        asked = self._asked or self._hooks.stop_reason
        if not self._ranks.all_reduce_max([float(asked is not None)])[0]:
            return False
        self.stopped = next(reason for reason in self._ranks.all_gather_object(asked) if reason is not None)
        self._asked = self._hooks.stop_reason = None
        return True

    def go_on(self) -> None:
        """Steps follow: what was said of an earlier end is over."""
        self.stopped = None
        if self._folder is not None:
            self._folder.go_on()

    def show(self) -> None:
        """The run's page as it is now, if it is time to; of several processes the first one writes it."""
        if self._page is not None:
            self._page.update()

    @contextmanager
    def told(self, steps: Callable[[], int]) -> Iterator[None]:
        """A block of the run. When an exception ends it, the folder says so, the observers hear of it, with the steps done (`steps()`).

        However it ends, the page is written a last time and reloads no more: it comes last, because it shows what the folder says.
        """
        try:
            with self._observers.until_the_end(steps):
                try:
                    yield
                except BaseException as error:
                    if self._folder is not None and self._observers.began:
                        self._folder.end(*how_it_ended(error), steps())
                    self.unsaved = 0  # the error tells what is saved
                    raise
        finally:
            if self._page is not None and self._folder is not None and not self._folder.lock.lost:
                self._page.close()

    def record(self, done: int, of: int) -> None:
        """The folder says that the run ended as it should, after `done` steps `of` those that the config asks for."""
        if self._folder is not None:
            how: How = "finished" if self.stopped is None else "stopped"
            reason = self.stopped or ("all steps are done" if done >= of else "the loop by hand ended it")
            self._folder.end(how, reason, done)


def _tell_unsaved(folder: str | None, unsaved: list[int]) -> None:
    """A Runner is gone: the steps that a loop by hand made and never saved are told."""
    if folder is not None and unsaved[0]:
        steps = "1 step of this run was" if unsaved[0] == 1 else f"{unsaved[0]} steps of this run were"
        warn(
            f"{folder}: {steps} never saved. End a loop by hand with runner.end(), or write `with Runner(config) as runner:`."
        )
