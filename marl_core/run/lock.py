"""One run at a time in a run folder: a lock file with the process id. A dead process's lock is taken over."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

from marl_core.errors import ConfigError

NAME = ".lock"


class RunLock:
    """The lock file of one run folder. A process may take the same lock again: a notebook builds its Runner anew."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / NAME

    def take(self) -> str | None:
        """Take the lock; a sentence when it was a dead run's. ConfigError when another run that is alive holds it."""
        me = _myself()
        with self._opened() as stream:
            held = _read(stream)
            if held and held != me and (held["host"] != me["host"] or _started(held["pid"]) == held["started"]):
                raise ConfigError(
                    f"run.folder: {self.file.parent} is in use by another run, process {held['pid']} on {held['host']}. "
                    f"Wait for it, stop it, or give another folder. If that run is surely dead, delete {self.file}."
                )
            stream.seek(0)
            stream.truncate()
            json.dump(me, stream)
        return f"took over the lock of process {held['pid']}, which is dead" if held and held != me else None

    def release(self) -> None:
        """Give the lock back, if it is this process's."""
        if self.file.is_file():
            with self.file.open(encoding="utf-8") as stream:
                mine = _read(stream) == _myself()
            if mine:
                self.file.unlink(missing_ok=True)

    @contextmanager
    def _opened(self) -> Iterator[TextIOWrapper]:
        """The file, ours alone while we look and write; one that was deleted meanwhile is opened anew."""
        while True:
            with os.fdopen(os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX)
                except OSError:  # a network disk without locks: the process id alone has to do
                    yield stream
                    return
                if self.file.exists() and os.fstat(stream.fileno()).st_ino == self.file.stat().st_ino:
                    yield stream
                    return


def _myself() -> dict[str, object]:
    return {"pid": os.getpid(), "started": _started(os.getpid()), "host": platform.node()}


def _read(stream: TextIOWrapper) -> dict[str, object]:
    """Who holds the lock; nobody when the file is empty or was cut short by a crash."""
    try:
        held = json.loads(stream.read())
    except (ValueError, OSError):
        return {}
    return held if isinstance(held, dict) and set(held) == {"pid", "started", "host"} else {}


def _started(pid: object) -> str | None:
    """When a process of this machine was started, in the system's own ticks; None when there is no such process.

    The start tells a process from a later one with the same number.
    """
    if not isinstance(pid, int):
        return None
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if line[0] in "ZX" else line[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:  # no /proc, as on macOS: the number alone
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return "alive"
    return "alive"
