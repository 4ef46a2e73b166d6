"""When, where and by which command a run was started, and each time it was resumed."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from marl_core.config.redact import REDACTED, redact
from marl_core.store.files import read_lines

GIT_SECONDS = 10.0
"""How long git may take to answer; a run doesn't wait for a slow disk."""
MAX_ARGUMENT = 500
"""Characters of an argument beyond which it is cut short: some programs are given a whole script as one."""

_SECRET_NAME = r"[\w.-]*(?:token(?!s|iz)|secret|passw|credential|api[-_]?key|access[-_]?key|private[-_]?key)[\w.-]*"
_SECRET_OPTION = re.compile(rf"--?{_SECRET_NAME}", re.IGNORECASE)
_SECRET_VALUE = re.compile(rf"((?:--?)?{_SECRET_NAME}=)(?=.)", re.IGNORECASE)


def session(how: Literal["start", "resume"], step: int, packages: Any) -> dict[str, Any]:
    """One start or resume: when (Unix seconds), after which step, by which command, in which folder, on which host.

    `config` is the YAML file among the command's arguments, None without one. `git` is the commit of the working folder
    and whether tracked files were changed since; None outside a repository.
    """
    return {
        "how": how,
        "step": step,
        "time": round(time.time(), 1),
        "command": command(),
        "folder": redact(os.getcwd()),
        "config": _config_file(),
        "host": platform.node(),
        "git": _git(),
        "packages": packages,
    }


def command() -> list[str]:
    """The command of this process, as a person would type it, secrets struck out."""
    arguments = list(getattr(sys, "argv", None) or [""])
    module = getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", None)
    head = ["python", "-m", module.removesuffix(".__main__")] if module else [_program(arguments[0])]
    return [*head, *without_secrets(arguments[1:])]


def without_secrets(arguments: Iterable[str]) -> list[str]:
    """Arguments with every secret struck out, the values of options that are named like one too."""
    shown: list[str] = []
    follows_a_secret_option = False
    for argument in arguments:
        named = _SECRET_VALUE.match(argument)
        text = f"{named[1]}{REDACTED}" if named else REDACTED if follows_a_secret_option else redact(argument)
        follows_a_secret_option = bool(_SECRET_OPTION.fullmatch(argument))
        shown.append(text if len(text) <= MAX_ARGUMENT else f"{text[:MAX_ARGUMENT]}…")
    return shown


def _program(file: str) -> str:
    """An installed command by its name, a script by the path it was called by."""
    path = Path(file)
    return path.name if path.parent == Path(sys.executable).parent else redact(file)


def _config_file() -> str | None:
    for argument in (getattr(sys, "argv", None) or [""])[1:]:
        if argument.endswith((".yaml", ".yml")) and os.path.isfile(argument):
            return redact(os.path.realpath(argument))
    return None


def _git() -> dict[str, Any] | None:
    commit = _ask_git("rev-parse", "HEAD")
    if not commit:
        return None
    changed = _ask_git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def _ask_git(*arguments: str) -> str | None:
    """What git says of the working folder; None without git, outside a repository, or when it takes too long."""
    quiet = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **quiet},
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def earlier_sessions(file: Path) -> list[dict[str, Any]]:
    """The sessions that a provenance.json records; none in one of an older version, or that is damaged."""
    with suppress(OSError, ValueError):
        record = json.loads(file.read_text(encoding="utf-8"))
        found = record.get("sessions") if isinstance(record, dict) else None
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return []


def closed(sessions: Sequence[dict[str, Any]], until: float | None) -> list[dict[str, Any]]:
    """The sessions, the last of them with the time (Unix seconds) that it was seen last at."""
    if not sessions or until is None or "until" in sessions[-1]:
        return list(sessions)
    return [*sessions[:-1], {**sessions[-1], "until": until}]


def last_seen(folder: Path) -> float | None:
    """Unix seconds of the last step, or the end, that the run in this folder wrote; None when nothing tells."""
    times: list[Any] = [line.get("time") for line in read_lines(folder / "steps.jsonl")]
    with suppress(OSError, ValueError, AttributeError):
        times.append(json.loads((folder / "ended.json").read_text(encoding="utf-8")).get("time"))
    return max((time for time in times if isinstance(time, int | float)), default=None)
