"""Memory and seconds a step of each layout: short runs without evaluation, one after the other."""

import shutil
from pathlib import Path
from typing import Any

from arms import Inputs, read_arms
from quickstart_parts import console
from results import RESULTS, write
from work import Job, run

LAYOUTS = ("head", "adapter", "rloo", "grpo", "a", "four")
SHORT, LONG = 2, 8  # the difference of two runs is what the steps between them cost


def measure_costs(runs: Path, inputs: Inputs, threads: int | None) -> None:
    """Write results/layouts.jsonl, unless it is there."""
    file = RESULTS / "layouts.jsonl"
    if file.is_file():
        console.print(f"done before: {file}")
        return
    rows = []
    for name in LAYOUTS:
        short, long = (_cost(runs, inputs, name, steps, threads) for steps in (SHORT, LONG))
        seconds = (long["cpu_seconds"] - short["cpu_seconds"]) / (LONG - SHORT)
        rows.append({"arm": name, "peak_rss_mib": long["peak_rss_mib"], "cpu_seconds_per_step": round(seconds, 2)})
        console.print(rows[-1])
    write(file, rows)


def _cost(runs: Path, inputs: Inputs, name: str, steps: int, threads: int | None) -> dict[str, Any]:
    folder = runs / "costs" / f"{name}-{steps}"
    more: dict[str, Any] = {"ppo.steps": steps, "eval": {}, "observers": [], "run.checkpoint_every": 0}
    arm = read_arms()[name]
    config = arm.config(inputs, 0, folder, more | ({"run.threads": threads} if threads else {}))
    job = Job(arm, 0, folder, config)
    if not job.finished:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed the rest would be measured
    return job.cost if job.finished else run(job, inputs)[1]
