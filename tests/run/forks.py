"""A process that imports everything once and forks a `marl run` for each line it is given.

Importing takes seconds, a run of the tiny model one: so runs can be killed by the dozen. No thread is started before
a fork. Used by test_kills.py as a program of its own; nothing here is imported by tests.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


def die_at_flush(number: int | None, count_file: str) -> None:
    """SIGKILL at the n-th fsync: in the middle of writing a file or a folder. Counts them when there is no n."""
    system: Any = os
    real, seen = os.fsync, 0

    def fsync(handle: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            system.kill(system.getpid(), signal.SIGKILL)
        real(handle)
        if number is None:
            Path(count_file).write_text(str(seen), encoding="utf-8")

    system.fsync = fsync


def child(order: dict[str, Any]) -> int:
    """One run, its words in a file."""
    with open(order["log"], "a", buffering=1, encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        die_at_flush(order["flush"], order["count"])
        from marl_core.cli.app import main

        return main(["run", order["config"], *order["options"]])


def serve() -> None:
    """An order a line in; the child's number and, at its end, its status a line out."""
    import torch

    import marl_core.run.runner  # noqa: F401  # here, so that no child has to
    import marl_plugins.reward_function  # noqa: F401

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        number = os.fork()
        if number == 0:
            code = 99
            try:
                code = child(json.loads(line))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(number, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
