"""Stages that are done once: each fills a folder of its own and leaves a `done.json` that says from what."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

DONE = "done.json"
LIBRARIES = ("torch", "transformers", "peft", "trl", "marl-core")

console = Console(highlight=False)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: `build` fills the folder it is given and returns what it measured."""

    title: str
    folder: Path
    settings: dict[str, Any]  # all that the result depends on, the keys of earlier stages included
    build: Callable[[Path], dict[str, float]]
    tell: Callable[[dict[str, float]], str]  # the measurements in one line

    @property
    def key(self) -> str:
        """A hash of the settings and of the libraries' versions."""
        return key_of({"settings": self.settings, "versions": {name: version(name) for name in LIBRARIES}})


def key_of(anything: Any) -> str:
    """A short hash of JSON-able data."""
    return hashlib.sha256(json.dumps(anything, sort_keys=True, default=str).encode()).hexdigest()[:16]


def headline(title: str) -> None:
    """Say which stage begins."""
    console.print()
    console.rule(f"[bold]{title}", align="left")


def run_stage(stage: Stage) -> bool:
    """Build the stage unless it is done already; True when it was built now.

    It is built in a temporary folder and renamed, so a folder under its real name is always whole.
    """
    headline(stage.title)
    done = _read_done(stage.folder)
    if done.get("key") == stage.key:
        console.print(f"done before ({done['seconds']:.0f} s): {stage.tell(done['result'])}")
        return False
    temporary = stage.folder.with_name(f".{stage.folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    start = time.monotonic()
    result = stage.build(temporary)
    seconds = time.monotonic() - start
    done = {"key": stage.key, "seconds": round(seconds, 1), "settings": stage.settings, "result": result}
    (temporary / DONE).write_text(json.dumps(done, indent=2, default=str) + "\n", encoding="utf-8")
    shutil.rmtree(stage.folder, ignore_errors=True)
    temporary.replace(stage.folder)
    console.print(f"{stage.tell(result)}  [dim]({seconds:.0f} s)[/]")
    return True


def _read_done(folder: Path) -> dict[str, Any]:
    """What an earlier run left; empty when there is nothing usable."""
    try:
        done: dict[str, Any] = json.loads((folder / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return done
