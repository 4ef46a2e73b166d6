"""Stage 3: `marl run` with what stages 1 and 2 made, in a process of its own."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages import console, headline, key_of

from marl_core.errors import DataError

CONFIG = Path(__file__).with_name("ppo.yaml")


def run_ppo(run: Path, changes: Mapping[str, Any], inputs_key: str) -> int:
    """Run PPO in the folder `run`: skipped when finished, resumed when interrupted; returns the exit code.

    `changes` are keys of the config and their values; `inputs_key` says from what the earlier stages were made.
    """
    headline("Stage 3: PPO, with policy, reference, reward and value on one base")
    key = key_of(
        [inputs_key, CONFIG.read_text(encoding="utf-8"), {name: str(value) for name, value in changes.items()}]
    )
    remembered = run.with_name(f"{run.name}-inputs") / "ppo-key.txt"
    if run.exists() and (not remembered.is_file() or remembered.read_text(encoding="utf-8") != key):
        raise DataError(f"{run} is a run with other settings or other inputs. Move or delete it, then start again.")
    if (run / "final" / "policy" / "adapter_config.json").is_file():
        console.print(f"done before: {run}")
        return 0
    remembered.write_text(key, encoding="utf-8")
    command = [sys.executable, "-m", "marl_core.cli", "run", str(CONFIG)]
    for name, value in {**changes, "run.folder": run}.items():
        command += ["--set", f"{name}={value}"]
    if run.exists():
        command.append("--resume")
    return subprocess.run(command, check=False).returncode
