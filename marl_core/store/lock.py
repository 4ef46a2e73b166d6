"""One run at a time in a run folder: a lock of the system's, held for the life of the run and gone with its process."""

from __future__ import annotations

import atexit
import errno
import json
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import ClassVar
from weakref import WeakValueDictionary

from filelock import FileLock, Timeout

from marl_core.errors import ConfigError

LOCK_FILE = ".lock"
HOLDER_FILE = ".lock.json"
"""Who holds the lock, for the message alone: the lock itself is the system's, and ends with the process wherever it ran."""
NO_LOCKS_ERRNOS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a disk without locks answers."""


class RunLock:
    """The lock of one run folder, from `take` until `release`, or until nobody holds this object any more.

    Within one process the newest wins: a notebook builds its Runner anew, and the one before loses the folder.
    """

    _newest: ClassVar[WeakValueDictionary[str, RunLock]] = WeakValueDictionary()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lost = False
        """Whether a later run of this process has taken the folder."""
        self._lock: FileLock | None = None
        self._pid = os.getpid()

    def take(self) -> str | None:
        """Take the lock, unless this object has it; a sentence worth telling. ConfigError when another run holds it."""
        self.refuse_lost()
        if self._lock is not None:
            return None
        path = os.path.realpath(self.folder)
        if not RunLock._newest:  # importing marl registers nothing
            atexit.unregister(_release_all)
            atexit.register(_release_all)
        previous = RunLock._newest.get(path)
        RunLock._newest[path] = self
        if previous is not None and previous is not self and previous._pid == os.getpid():
            self._lock, previous._lock, previous.lost = previous._lock, None, True
            if self._lock is not None:
                return None
        note = self._acquire()
        (self.folder / HOLDER_FILE).write_text(
            json.dumps({"pid": os.getpid(), "host": platform.node()}) + "\n", encoding="utf-8"
        )
        return note

    def refuse_lost(self) -> None:
        """ConfigError when a later run of this process has taken the folder: two must not write into it."""
        if self.lost:
            raise ConfigError(
                f"run.folder: {self.folder} was taken over by a Runner that this process made later. "
                "Go on with that one, or give this one another folder."
            )

    def release(self) -> None:
        """Give the lock back, if this object has it. A forked child has its parent's objects, and none of its locks."""
        if self._lock is None or os.getpid() != self._pid:
            return
        (self.folder / HOLDER_FILE).unlink(missing_ok=True)
        self._lock.release(force=True)
        self._lock = None

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be ending, the folder may be gone: the system lets go by itself
            self.release()

    def _acquire(self) -> str | None:
        holder = _holder(self.folder)
        who = (
            f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
            if holder
            else "a process that left no name"
        )
        lock = FileLock(self.folder / LOCK_FILE, timeout=0, thread_local=False, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"run.folder: {self.folder} is in use by another run, {who}. Wait for it, stop it, or give another folder."
            ) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS_ERRNOS:
                raise
            return f"the disk of {self.folder} has no locks ({error}): nothing keeps a second run out of this folder"
        self._lock = lock
        return f"took over the lock of {who}, which is dead" if holder else None


def is_held(folder: Path) -> bool:
    """Whether a run seems to hold this folder: it says so, and its process is there, as far as this host can tell."""
    holder = _holder(folder)
    if not holder or holder.get("host") != platform.node():
        return bool(holder)
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0 or os.name == "nt":  # on Windows asking by signal 0 would end the process
        return isinstance(pid, int) and pid > 0
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _release_all() -> None:
    """A process that ends of itself leaves nothing that looks like a dead one's, whoever keeps its locks alive till then."""
    for lock in list(RunLock._newest.values()):
        with suppress(OSError):
            lock.release()


def _holder(folder: Path) -> dict[str, object]:
    """Who said last to hold the lock; nobody when the file isn't there or was cut short by a crash."""
    try:
        holder = json.loads((folder / HOLDER_FILE).read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}
    return holder if isinstance(holder, dict) else {}
