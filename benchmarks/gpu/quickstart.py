"""The quickstart on the device: SFT, reward adapter and PPO on the real model, its curve beside one of a CPU.

    python benchmarks/gpu/quickstart.py --device cuda
    python benchmarks/gpu/quickstart.py --device cpu --shape tiny    # a few steps of each stage

Needs the model and the text, which pack.sh brings (or a network). Stages 1 and 2 are TRL's; of a run that is cut off the steps that were
made are kept.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from record import Record, Skip, parse  # this folder is no package

ROOT = Path(__file__).parents[2]
CPU = ROOT / "benchmarks" / "results" / "quickstart-cpu.json"
"""The same steps on a CPU: score, KL and length of each."""
CURVE = {"score": "reward/mean", "kl": "kl/policy_reference"}


def main() -> None:
    """One row with the seconds of the whole, the curve, and how far it is from the CPU's."""
    record = Record("quickstart", parse("quickstart", __doc__))
    with tempfile.TemporaryDirectory(prefix="marl-quickstart-") as folder:
        record.measure("quickstart", lambda: tell(Path(folder), record))


def tell(folder: Path, record: Record) -> dict[str, Any]:
    """Run the example's own script in a folder of its own."""
    missing = [name for name in ("trl", "gguf", "vaderSentiment") if not importable(name)]
    if missing:
        raise Skip(f"{', '.join(missing)} can't be imported here; pack.sh brings them")
    fast = record.asked.shape == "tiny"
    (folder / "examples").symlink_to(ROOT / "examples")
    command = [sys.executable, str(ROOT / "examples" / "quickstart" / "quickstart.py"), *(["--fast"] if fast else [])]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if record.asked.device == "cpu" else {}
    began = time.perf_counter()
    child = subprocess.Popen(
        command, cwd=folder, env={**os.environ, **hidden}, stdout=sys.stderr, stderr=sys.stderr, start_new_session=True
    )
    try:
        code: int | None = child.wait(max(record.left, 1))
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        code = None
    seconds = time.perf_counter() - began
    run = folder / "runs" / ("quickstart-fast" if fast else "quickstart")
    steps = read(run)
    if code not in (0, None) or not steps:
        raise RuntimeError(f"the quickstart ended with {'its limit' if code is None else f'exit code {code}'}, {len(steps)} steps")
    found = {
        "ended": "whole" if code == 0 else "cut off at its limit",
        "steps": len(steps),
        "seconds": round(seconds, 1),
        "seconds_a_step": round(sum(step["seconds"] for step in steps[1:]) / max(len(steps) - 1, 1), 3),
        "curve": {name: [round(step[name], 4) for step in steps] for name in ("score", "kl", "length")},
    }
    return found | ({} if fast else beside(found["curve"]))


def read(run: Path) -> list[dict[str, float]]:
    """The steps that the run has written."""
    file = run / "steps.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    return [figures(row) for row in rows]
