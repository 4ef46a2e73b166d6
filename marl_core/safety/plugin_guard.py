"""Guards the state that plugins must not change while they are called: it is restored with a warning, or the run stops."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.integrity import ModeSnapshot, frozen_weights, learning_weights
from marl_core.bank.views import ScoreView, View
from marl_core.errors import NumericError, PluginError, warn
from marl_core.ppo.roles import RewardSource, Roles
from marl_core.registry.raised_from import raised_from
from marl_core.registry.snapshot import Snapshot, torch_modes

REMEDY = "resume from the last checkpoint without that plugin, and report it to its authors"


class PluginGuard:
    """Checks around each call of a plugin, and at the end of each step, that what all share is unchanged.

    Until `start` only the process is guarded: threads, default dtype, gradient mode. From then on the bank is too.
    Random state isn't: everything marl draws comes from seeds of its own, so a plugin may draw and seed as it likes.
    """

    def __init__(self) -> None:
        self.called: list[str] = []
        """Plugins called since the last thorough check, the latest last."""
        self._warned: set[tuple[str, str]] = set()
        self._bank: AdapterBank | None = None
        self._checksum: int | None = None

    @property
    def last(self) -> str:
        """The plugin called last."""
        return self.called[-1] if self.called else "none"

    def start(self, bank: AdapterBank) -> None:
        """Guard this bank from now on."""
        self._bank, self._modes = bank, ModeSnapshot(bank)
        self._frozen, self._learning = frozen_weights(bank), learning_weights(bank)

    def baseline(self) -> None:
        """Record the frozen weights as they must stay; called after the first passes, in which some quantized kernels repack them."""
        self._frozen.note()
        self._checksum = self._frozen.checksum()

    @contextmanager
    def call(self, origin: str, *, writes: bool = False) -> Iterator[None]:
        """A block that is one call of a plugin; `writes`: it may write weights of its own. PluginError when others changed."""
        self.called = [*(name for name in self.called if name != origin), origin]
        process = Snapshot.of(torch_modes())
        if self._bank is None or writes:
            try:
                yield
            finally:
                self._warn(origin, _put_back(process))
            return
        modes, frozen, learning = self._modes.read(), self._frozen.versions(), self._learning.versions()
        try:
            yield
        finally:
            self._warn(origin, _put_back(process) + self._modes.put_back(modes))
        _refuse(origin, "weights that the optimizer alone may change", self._learning.changed(learning))
        _refuse(origin, "frozen weights", self._frozen.changed(frozen))

    def wrapped(self, function: Callable[..., Any], origin: str) -> Callable[..., Any]:
        """The function, guarded; what it prints goes to standard error, because standard output is the run's own."""

        @functools.wraps(function, assigned=(), updated=())
        def guarded(*arguments: Any, **named: Any) -> Any:
            try:
                with self.call(origin), redirect_stdout(sys.stderr):
                    return function(*arguments, **named)
            except (Exception, SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # not even an Exception: nobody above would know whose it is
                place = raised_from(error, function)
                raise PluginError(f"{origin} failed: {error!r}. {place}Report it to its authors.") from error

        return guarded

    def wrapped_roles(self, roles: Roles) -> Roles:
        """The roles with every plugin's callable guarded; views of the base call no plugin."""
        reference = roles.reference
        if not isinstance(reference, View):
            reference = self.wrapped(reference, roles.reference_origin)
        return replace(
            roles, reference=reference, rewards=self._sources(roles.rewards), judges=self._sources(roles.judges)
        )

    def _sources(self, sources: tuple[RewardSource, ...]) -> tuple[RewardSource, ...]:
        return tuple(
            source
            if isinstance(source.score, ScoreView)
            else replace(source, score=self.wrapped(source.score, source.who))
            for source in sources
        )

    def step_ended(self, step: int, *, thorough: bool = False) -> None:
        """Check that frozen weights are unchanged and the same weights learn; `thorough` reads all weights, for checkpoints.

        NumericError when `requires_grad` was changed outside of a plugin's call, PluginError when frozen weights were.
        """
        if self._bank is None:
            return
        if self._modes.put_back_learning():
            raise NumericError(
                f"step {step}: which weights learn (requires_grad) was changed during the step, outside any plugin's call; it has "
                f"been put back. Last plugin called: {self.last}. Look for code that calls requires_grad_ or PEFT's set_adapter."
            )
        _refuse(
            f"step {step}: {self.last}, or code outside any plugin's call,", "frozen weights", self._frozen.changed()
        )
        if thorough and self._checksum is not None and self._frozen.checksum() != self._checksum:
            raise PluginError(
                f"step {step}: frozen weights are other than at the start, written past torch's counter (as `tensor.data` does). Plugins "
                f"called since the last checkpoint: {', '.join(self.called) or 'none'}. Nothing was saved; {REMEDY}."
            )
        self.called = [] if thorough else self.called

    def _warn(self, origin: str, undone: list[str]) -> None:
        for change in undone:
            if (origin, change) not in self._warned:
                self._warned.add((origin, change))
                warn(
                    f"{origin} changed {change} while it was called; put back. It is a fault of the plugin; said once."
                )


def _refuse(who: str, what: str, changed: list[str]) -> None:
    """PluginError when there are changed weights."""
    if changed:
        more = f" and {len(changed) - 1} more tensors" if len(changed) > 1 else ""
        raise PluginError(
            f"{who} changed {what}: {changed[0]}{more}. All roles share them, so this step can't be trusted; {REMEDY}."
        )


def _put_back(process: Snapshot) -> list[str]:
    """Restore torch's modes; a description of each that had changed."""
    return [str(change) for change in process.put_back()]
