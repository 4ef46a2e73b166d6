"""The study in pieces of about half a minute: each is a process of its own and leaves one file, which is there when it is whole.

A piece that was killed is done again from its start, and gives the same; finished ones are skipped. Processes are forked from one that
has loaded the libraries, so a piece pays for its own work alone.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marl_core.errors import MarlError, Stopped

HERE = Path(__file__).parent
LIBRARIES = ["torch", "transformers", "peft", "marl_core.run.runner", "marl_plugins"]
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(LIBRARIES)


@dataclass(frozen=True, slots=True)
class Piece:
    """One file of results: what it is called, where it lies, what it is made from, and the function that makes it.

    `make` and `arguments` go to another process, so they are a function of a module and plain data. A file made from other arguments
    is refused: it would stand in the tables under a name that isn't its own.
    """

    name: str
    file: Path
    make: Callable[..., dict[str, Any]]
    arguments: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        """Whether it was made, from these very arguments."""
        if not self.file.is_file():
            return False
        if json.loads(self.file.read_text(encoding="utf-8"))["arguments"] != json.loads(json.dumps(self.arguments)):
            raise MarlError(f"{self.file} was made from another config. Move or delete it, then start again.")
        return True

    @property
    def result(self) -> dict[str, Any]:
        """What it gave."""
        found: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))["result"]
        return found

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.file.with_suffix(".log")


def do(piece: Piece) -> None:
    """Make one piece, in a process of its own: both outputs go to its log, and its file appears whole."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal's Ctrl-C goes to all; the study lets a piece come to its end
    with open(piece.log, "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        result = piece.make(**piece.arguments)
        sys.stdout.flush()
    draft = piece.file.with_name(f".{piece.file.name}.{os.getpid()}")
    whole = {"arguments": piece.arguments, "commit": commit(), "result": result}
    draft.write_text(json.dumps(whole) + "\n", encoding="utf-8")
    os.replace(draft, piece.file)


def do_all(pieces: Sequence[Piece], workers: int, tell: Callable[[str], None] = print) -> None:
    """Make what isn't finished, `workers` at a time. One that fails stops no other; MarlError names all that failed, at the end.

    The first Ctrl-C or SIGTERM lets the pieces under way come to their end and starts no more (Stopped); a second ends them.
    """
    waiting = [piece for piece in pieces if not piece.finished]
    tell(f"pieces: {len(pieces)}, done before: {len(pieces) - len(waiting)}")
    failures = []
    with asked_to_stop() as stop, ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(_watched, piece, stop): piece for piece in waiting}
        for future in as_completed(futures):
            piece, seconds = futures[future], future.result()
            if piece.file.is_file():
                tell(f"{time.strftime('%H:%M')} {piece.name}: {seconds:.0f} s")
            elif not stop.is_set():
                failures.append(piece)
                tell(f"{piece.name} failed; see {piece.log}")
    if stop.is_set():
        raise Stopped("stopped; the same command goes on from here.", signal.SIGTERM)
    if failures:
        raise MarlError(
            f"{len(failures)} of {len(waiting)} pieces failed; correct what their logs say, then start again."
        )


def _watched(piece: Piece, stop: threading.Event) -> float:
    """Start one piece and wait for its end; seconds on the clock."""
    if stop.is_set():
        return 0.0
    piece.file.parent.mkdir(parents=True, exist_ok=True)
    child = _server.Process(target=do, args=(piece,), name=piece.name)
    started = time.monotonic()
    child.start()
    child.join()
    return time.monotonic() - started


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second ends the pieces under way and this process."""
    event = threading.Event()
    before: dict[int, Any] = {}

    def ask(number: int, frame: object) -> None:
        if not event.is_set():
            event.set()
            return
        for child in multiprocessing.active_children():
            child.terminate()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def commit() -> str | None:
    """The commit of this checkout, if it is one."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
