"""The quickstart's PPO on the real model on the device, its curve beside that of a CPU.

    python benchmarks/gpu/quickstart.py --device cuda
    python benchmarks/gpu/quickstart.py --device cpu --shape tiny    # a few steps of each stage

Needs the model and the text, which pack.sh brings (or a network). Where the adapters of stages 1 and 2 were brought too, PPO alone is run,
from the very adapters that the CPU's curve began with; else the whole quickstart. Of a run that is cut off its steps are kept.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from record import Record, Skip, parse  # this folder is no package

ROOT = Path(__file__).parents[2]
CPU = ROOT / "benchmarks" / "results" / "quickstart-cpu.json"
"""The same steps from the same adapters on a CPU."""
FIGURES = {
    "score": "objective/scores",
    "kl": "objective/kl",
    "length": "tokens/mean_length",
    "first_ratio_error": "policy/first_ratio_error",
    "seconds": "perf/seconds",
    "seconds_generate": "perf/seconds_generate",
    "seconds_score": "perf/seconds_score",
    "seconds_update": "perf/seconds_update",
}
"""Names of the curves and of what steps.jsonl calls them."""


def main() -> None:
    """One row: the curve, its seconds, and how far it is from the CPU's."""
    record = Record("quickstart", parse("quickstart", __doc__))
    with tempfile.TemporaryDirectory(prefix="marl-quickstart-") as folder:
        record.measure("quickstart", lambda: tell(Path(folder), record))


def tell(folder: Path, record: Record) -> dict[str, Any]:
    """Run it in a folder of its own, until it ends or the part's limit."""
    missing = [name for name in ("trl", "gguf", "vaderSentiment") if find_spec(name) is None]
    if missing:
        raise Skip(f"{', '.join(missing)} can't be imported here; pack.sh brings them")
    asked, inputs = record.asked, made_before()
    (folder / "examples").symlink_to(ROOT / "examples")
    run = folder / "runs" / ("quickstart-fast" if asked.shape == "tiny" else "quickstart")
    if asked.shape == "tiny" or inputs is None:
        command = [str(ROOT / "examples" / "quickstart" / "quickstart.py")]
        command += ["--fast"] if asked.shape == "tiny" else []
    else:
        command = ["-m", "marl_core.cli", "run", "examples/quickstart/ppo.yaml"]
        for key, value in {**settings(inputs), "run.folder": str(run), "run.device": asked.device}.items():
            command += ["--set", f"{key}={value}"]
    began = time.perf_counter()
    code = until(record.left, command, folder, asked.device)
    seconds = time.perf_counter() - began
    steps = read(run)
    ended = "at its limit" if code is None else f"with exit code {code}"
    if code not in (0, None) or not steps:
        raise RuntimeError(f"it ended {ended} after {len(steps)} steps; see the log")
    curve = {name: [round(step[name], 4) for step in steps] for name in FIGURES}
    found = {
        "ended": ended,
        "from": "adapters that were brought" if "-m" in command else "stages 1 and 2 here",
        "steps": len(steps),
        "seconds": round(seconds, 1),
        "seconds_a_step": round(sum(curve["seconds"][1:]) / max(len(steps) - 1, 1), 3),
        "largest_first_ratio_error": max(curve["first_ratio_error"]),
        "curve": curve,
    }
    return found | ({} if asked.shape == "tiny" else beside(curve))


def made_before() -> Path | None:
    """The folder of stages 1 and 2, brought along or made here by `make quickstart`: then PPO alone is run."""
    for place in (os.environ.get("MARL_QUICKSTART_INPUTS"), ROOT / "runs" / "quickstart-inputs"):
        if place and (Path(place) / "reward" / "adapter_config.json").is_file():
            return Path(place).resolve()
    return None


def settings(inputs: Path) -> dict[str, str]:
    """What quickstart.py sets in ppo.yaml."""
    sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
    from fetch import fetch_model

    return {
        "model.path": fetch_model(),
        "reference.adapter": str(inputs / "sft"),
        "reward.path": str(inputs / "reward"),
        "data.prompts": str(inputs / "prompts.jsonl"),
        "eval.prompts": str(inputs / "heldout.jsonl"),
    }


def until(seconds: float, command: list[str], folder: Path, device: str) -> int | None:
    """The exit code of a Python command; None when it was killed after so many seconds, with all that it started."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    child = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **hidden},
        stdout=sys.stderr,
        stderr=sys.stderr,
        start_new_session=True,
    )
    try:
        return child.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def read(run: Path) -> list[dict[str, float]]:
    """The steps that the run has written; the last line may be half a line."""
    file, found = run / "steps.jsonl", []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        found.append({name: float(row.get(key, 0.0)) for name, key in FIGURES.items()})
    return found


def beside(curve: dict[str, list[float]]) -> dict[str, Any]:
    """The CPU's curve for as many steps, and the mean difference over the last ten of them."""
    if not CPU.is_file():
        return {"cpu": "benchmarks/results/quickstart-cpu.json isn't there"}
    cpu = json.loads(CPU.read_text(encoding="utf-8"))["curve"]
    count = min(len(curve["score"]), len(cpu["score"]))
    last = slice(max(count - 10, 0), count)
    gap = {name: mean(curve[name][last]) - mean(cpu[name][last]) for name in ("score", "kl", "length")}
    return {
        "cpu": {name: cpu[name][:count] for name in gap},
        "mean_of_last_ten_less_the_cpus": {name: round(value, 4) for name, value in gap.items()},
    }


if __name__ == "__main__":
    main()
