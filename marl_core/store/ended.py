"""ended.json in a run folder: how the run ended. A run that is going, or was killed, has none."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Literal, TypeAlias

from marl_core.config.redact import redact
from marl_core.errors import Stopped
from marl_core.store.files import write_json

FILE = "ended.json"
How: TypeAlias = Literal["finished", "stopped", "interrupted", "failed"]
"""All steps done; asked to stop by a strategy or by `Runner.request_stop`; a signal, or a loop that was left; an error."""


def write(folder: Path, how: How, reason: str, step: int) -> None:
    """Write it: `reason` in words, `step` steps done, `time` in seconds since 1970. OSError when the disk takes no more."""
    write_json(folder / FILE, {"how": how, "reason": redact(reason), "step": step, "time": round(time.time(), 1)})


def how_it_ended(error: BaseException) -> tuple[How, str]:
    """What an exception that ended a run means, and the reason in words."""
    if isinstance(error, Stopped):
        return "interrupted", signal.Signals(error.exit_code - 128).name
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "SIGINT"
    if isinstance(error, GeneratorExit):
        return "interrupted", "the loop over its steps was left"
    return "failed", f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def stop_note(folder: Path) -> list[str]:
    """A sentence for a run that goes on although it was asked to stop; nothing for any other."""
    try:
        end = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(end, dict) or end.get("how") != "stopped":
        return []
    return [f"this run was stopped after step {end.get('step')}: {end.get('reason')}; now it goes on"]
