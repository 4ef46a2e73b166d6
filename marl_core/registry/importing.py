"""What importing a plugin may not change: the random states, the working folder, torch's settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from marl_core.registry.snapshot import Snapshot, random_states, torch_modes, working_folder


@contextmanager
def process_state_restored() -> Iterator[list[str]]:
    """Restore the process's state at the end of the block. The list that it yields then names what was restored."""
    restored: list[str] = []
    before = Snapshot.of([*random_states(), working_folder(), *torch_modes()])
    try:
        yield restored
    finally:
        restored += [change.setting.name for change in before.put_back()]
