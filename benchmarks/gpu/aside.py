"""Measurements in a process of their own: what hangs, or takes the device down with it, ends that process alone.

Such a process loads its libraries while others measure, then waits to be asked, so its start costs next to nothing.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from record import Record, Skip

GROUP = "MARL_GPU_GROUP"
"""Environment variable: which measurements this process serves; absent in the one that a person starts."""
APART = "MARL_GPU_ASIDE"
"""Environment variable: processes of their own on a CPU too, to try them."""
LOADING = 60.0
"""Seconds that the libraries and the model may take to load."""
RESTARTS = 2
"""Times that a process is started again after it was ended."""
TOGETHER = 30.0
"""Seconds in which all are waited for before the first measurement."""

Work = Callable[[str], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Piece:
    """One measurement: its name, the process that it belongs to, the seconds it needs and those it may take, on one H200."""

    name: str
    group: str
    needs: float
    limit: float
    shapes: tuple[str, ...] = ("full", "tiny")
    dear_on_cpu: bool = False
    """Whether it takes minutes on a CPU, whatever the shape."""

    def wanted(self, asked: argparse.Namespace) -> bool:
        """Whether `--only` names it, or nothing."""
        return not asked.only or any(self.name.startswith(only) for only in asked.only)


class Here:
    """The same questions answered in this process: where nothing can hang, and processes are dear."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def ready(self, seconds: float = LOADING) -> bool:
        """It is."""
        return True

    def ask(self, name: str, seconds: float, loading: float = LOADING) -> dict[str, Any]:
        """The figures of one measurement; the limit is not kept."""
        return self._work(name)

    def start(self) -> None:
        """It runs."""

    def close(self) -> None:
        """Nothing is left."""


class Aside:
    """A process that runs this very script and serves one group of measurements."""

    def __init__(self, group: str, asked: argparse.Namespace) -> None:
        self._group, self._asked = group, asked
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._held = b""
        self._ends = 0
        self._broken: dict[str, Any] | None = None
        """The answer to all further questions, once the process can't be loaded, or was ended too often."""
        atexit.register(self.close)

    def start(self) -> None:
        """Begin to load, unless it has begun."""
        if self._process is not None:
            return
        asked = self._asked
        command = [sys.executable, os.path.abspath(sys.argv[0]), "--device", asked.device, "--shape", asked.shape]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"OMP_NUM_THREADS": "4", **os.environ, GROUP: self._group},  # several load at once
            start_new_session=True,  # its own children (compilers) end with it
        )
        self._ready, self._held = False, b""

    def ready(self, seconds: float = LOADING) -> bool:
        """Wait until it has loaded; False when it has not in that many seconds, or never will."""
        self.start()
        if self._ready or self._broken is not None:
            return self._ready
        found = self._line(seconds)
        if found is None and self._running and seconds < LOADING:
            return False
        self._ready = found is not None and "failed" not in found
        if not self._ready:
            self._broken = {**self._ended(f"its process did not load in {seconds:.0f} s"), **(found or {})}
        return self._ready

    @property
    def _running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ask(self, name: str, seconds: float, loading: float = LOADING) -> dict[str, Any]:
        """The figures of one measurement; a row that says so when none came in that many seconds, or the process ended."""
        if self._broken is not None:
            return dict(self._broken)
        if not self.ready(min(loading, LOADING)):
            return dict(self._broken or {"failed": "its process did not load"})
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(name).encode() + b"\n")
            process.stdin.flush()
        except OSError as error:
            return self._ended(f"its process can't be asked ({error})")
        found = self._line(seconds)
        if found is None:
            return self._ended(f"no figures came in {seconds:.0f} s, so its process was ended")
        if "CUDA error" in json.dumps(found):  # not an out of memory: the device answers nothing more in that process
            self._ended("its device failed")
        return found

    def _line(self, seconds: float) -> dict[str, Any] | None:
        """The next answer; None when there is none in time."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        end = time.perf_counter() + seconds
        while b"\n" not in self._held:
            left = end - time.perf_counter()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                return None
            piece = os.read(process.stdout.fileno(), 65536)
            if not piece:
                return None
            self._held += piece
        line, self._held = self._held.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        return found

    def _ended(self, why: str) -> dict[str, Any]:
        """End the process, and say so; another takes its place at the next question, RESTARTS times."""
        process, code = self._process, None
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(0.5)  # its pipe may close a moment before it ends
        self.close()
        self._ends += 1
        said = why if code is None else f"its process ended with code {code}"
        if self._ends > RESTARTS:
            self._broken = {"failed": f"not asked: {said} before, as {RESTARTS} times before that"}
        return {"failed": said}

    def close(self) -> None:
        """End the process and what it started; give its memory back."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def serve(load: Callable[[], Work]) -> None:
    """Load, then answer questions from stdin, one a line, until it closes."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # Linux: end when the parent ends, however that happens
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        work = load()
    except Exception as error:
        print(json.dumps(failure(error)), file=out, flush=True)
        return
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(work, json.loads(line))), file=out, flush=True)


def answer(work: Work, name: str) -> dict[str, Any]:
    """The figures, or why there are none."""
    try:
        found = work(name)
    except Skip as reason:
        found = {"skipped": str(reason)}
    except Exception as error:
        found = failure(error)
    free()
    return found


def failure(error: BaseException) -> dict[str, Any]:
    """A row that says what went wrong, and where."""
    return {"failed": said(error), "where": "".join(traceback.format_exception(error)).splitlines()[-12:]}


def said(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


def free() -> None:
    """Give back what the last measurement held."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def run_all(part: str, pieces: Sequence[Piece], asked: argparse.Namespace, load: Callable[[str], Work]) -> Record:
    """Measure the pieces that this shape has, in order: on a GPU each group in a process of its own, else here.

    `load`: group -> its measurements.
    """
    chosen = [piece for piece in pieces if asked.shape in piece.shapes and piece.wanted(asked)]
    places: dict[str, Aside | Here] = {}
    if asked.device == "cuda" or APART in os.environ:
        places = {group: Aside(group, asked) for group in dict.fromkeys(piece.group for piece in chosen)}
        for place in places.values():
            place.start()
    record = Record(part, asked)  # it loads libraries too, and the device
    if places:
        until = time.perf_counter() + TOGETHER
        for place in places.values():  # who loads while another measures disturbs it
            place.ready(max(until - time.perf_counter(), 0.1))
    for index, piece in enumerate(chosen):
        if piece.dear_on_cpu and asked.device == "cpu" and not asked.only:
            record.add({"name": piece.name, "skipped": "takes minutes on a CPU; --only measures it"})
        else:
            record.measure(piece.name, partial(_asked, places, piece, record, load), piece.needs)
        if piece.group in places and all(later.group != piece.group for later in chosen[index + 1 :]):
            places.pop(piece.group).close()
            free()
    return record


def _asked(
    places: dict[str, Aside | Here], piece: Piece, record: Record, load: Callable[[str], Work]
) -> dict[str, Any]:
    if piece.group not in places:
        places[piece.group] = Here(load(piece.group))
    left = max(record.left, 5.0)
    return places[piece.group].ask(piece.name, min(piece.limit, left), loading=left)


def attempt(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of a part of a row, or `<name>_failed`: the rest of the row stands."""
    try:
        return work()
    except Skip as reason:
        return {f"{name}_skipped": str(reason)}
    except Exception as error:
        return {f"{name}_failed": said(error)}
