"""What a process or a bank is set to at one moment: read, compared later, put back.

Three look after code that isn't marl's: the import of a plugin (registry/importing.py), each call of one (safety/plugin_guard.py), and
the contract for plugin authors (testing/traces.py). The settings that they compare are defined here once. torch and numpy are
read only where they are imported already.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Setting:
    """Something that can be read, compared with `==`, and set again."""

    name: str
    """For messages: `the number of threads`."""
    read: Callable[[], Any]
    """Its value now."""
    write: Callable[[Any], object] | None = None
    """Set it; None for what is only looked at."""
    shows_values: bool = False
    """Whether messages give the values: not of a random state."""


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that isn't what it was."""

    setting: Setting
    before: Any
    now: Any

    def __str__(self) -> str:
        """`the number of threads (1 to 2)`."""
        return f"{self.setting.name} ({self.before} to {self.now})" if self.setting.shows_values else self.setting.name


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Settings, and what each was when the snapshot was taken."""

    settings: tuple[Setting, ...]
    values: tuple[Any, ...]

    @classmethod
    def of(cls, settings: Iterable[Setting]) -> Self:
        """Read them all."""
        listed = tuple(settings)
        return cls(listed, tuple(setting.read() for setting in listed))

    def changes(self, later: Snapshot | None = None) -> list[Change]:
        """What is different in a `later` snapshot, or now; settings that the later one lacks are left out."""
        after = Snapshot.of(self.settings) if later is None else later
        now = {setting.name: value for setting, value in zip(after.settings, after.values, strict=True)}
        return [
            Change(setting, before, now[setting.name])
            for setting, before in zip(self.settings, self.values, strict=True)
            if setting.name in now and now[setting.name] != before
        ]

    def put_back(self) -> list[Change]:
        """Restore what has changed; returns those changes."""
        changes = self.changes()
        for change in changes:
            if change.setting.write is not None:
                change.setting.write(change.before)
        return changes


def random_states() -> list[Setting]:
    """The random states that all code of a process shares."""
    states = [Setting("Python's random state", random.getstate, random.setstate)]
    numpy = _loaded("numpy", "random")  # asking for it loads it: numpy itself doesn't before
    if numpy is not None:
        states.append(Setting("numpy's random state", lambda: _plain(numpy.random.get_state()), numpy.random.set_state))
    torch = _loaded("torch", "set_rng_state")
    if torch is not None:
        states.append(
            Setting(
                "torch's random state",
                lambda: torch.get_rng_state().tolist(),
                lambda state: torch.set_rng_state(torch.ByteTensor(state)),
            )
        )
    return states


def torch_modes() -> list[Setting]:
    """What torch computes with: threads, default dtype, gradient mode, deterministic mode; nothing where torch isn't imported."""
    torch = _loaded("torch", "use_deterministic_algorithms")
    if torch is None:
        return []
    deterministic = torch.are_deterministic_algorithms_enabled
    return [
        Setting("the number of threads", torch.get_num_threads, torch.set_num_threads, shows_values=True),
        Setting("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype, shows_values=True),
        Setting("gradient mode", torch.is_grad_enabled, torch.set_grad_enabled),
        Setting("torch's deterministic mode", deterministic, torch.use_deterministic_algorithms),
    ]


def working_folder() -> Setting:
    """The folder that relative paths begin at."""
    return Setting("the working folder", _folder, _change_folder)


def _folder() -> str:
    """Empty when somebody deleted it."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def _change_folder(folder: str) -> None:
    if folder:
        os.chdir(folder)


def _loaded(module: str, attribute: str) -> Any:
    """An imported module that already has this attribute; a module that is still being imported may lack it."""
    imported = sys.modules.get(module)
    return imported if imported is not None and hasattr(imported, attribute) else None


def _plain(state: Any) -> tuple[Any, ...]:
    """numpy's random state with its array as a tuple, which `==` compares as one."""
    return tuple(tuple(part.tolist()) if hasattr(part, "tolist") else part for part in state)
