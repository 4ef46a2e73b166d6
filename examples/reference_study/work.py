"""Run arms as processes of their own: skipped when finished, resumed when they were killed, a few at a time."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from arms import HERE, Arm, Inputs
from quickstart_parts import console

from marl_core.errors import MarlError

Cost = dict[str, Any]
COST = "cost.json"  # written last: its presence says that a run is finished


@dataclass(frozen=True, slots=True)
class Job:
    """One arm with one seed, in a folder."""

    arm: Arm
    seed: int
    folder: Path
    config: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether it ran to its end, under this very config."""
        if not (self.folder / COST).is_file():
            return False
        ran = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
        if ran != self.config:
            raise MarlError(f"{self.folder} was run with another config. Move or delete it, then start again.")
        return True

    @property
    def cost(self) -> Cost:
        """What a finished run cost: CPU seconds, peak memory in MiB."""
        cost: Cost = json.loads((self.folder / COST).read_text(encoding="utf-8"))
        return cost

    @property
    def config_file(self) -> Path:
        """The config it runs with, beside its folder."""
        return self.folder.with_suffix(".yaml")


def run_all(jobs: Sequence[Job], inputs: Inputs, workers: int) -> None:
    """Run what isn't finished, `workers` at a time; one that fails stops no other."""
    open_jobs = [job for job in jobs if not job.finished]
    console.print(f"{len(jobs)} runs, {len(jobs) - len(open_jobs)} of them done before")
    failures = []
    with ThreadPoolExecutor(workers) as pool:
        for future in as_completed([pool.submit(run, job, inputs) for job in open_jobs]):
            try:
                folder, cost = future.result()
                console.print(f"{time.strftime('%H:%M')} {folder.name}: {cost['cpu_seconds']:.0f} s of CPU")
            except MarlError as error:
                failures.append(str(error))
                console.print(f"[red]{error}[/]", soft_wrap=True)
    if failures:
        raise MarlError(
            f"{len(failures)} of {len(open_jobs)} runs failed; correct what their logs say, then start again."
        )


def run(job: Job, inputs: Inputs) -> tuple[Path, Cost]:
    """Run one job to its end; its folder and what it cost. A part that was killed before is resumed, its time not counted."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    job.config_file.write_text(yaml.safe_dump(job.config, sort_keys=False), encoding="utf-8")
    resume = (job.folder / "config.yaml").is_file() and any((job.folder / "checkpoints").glob("*"))
    if not resume:
        shutil.rmtree(job.folder, ignore_errors=True)
    with open(job.folder.with_suffix(".log"), "ab") as log:
        child = subprocess.Popen(job.arm.command(job.config_file, inputs, resume), stdout=log, stderr=log)
        _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise MarlError(f"{job.folder.name} failed; see {job.folder.with_suffix('.log')}.")
    shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
    seconds = round(used.ru_utime + used.ru_stime, 1)
    cost = {"cpu_seconds": seconds, "peak_rss_mib": round(used.ru_maxrss / 1024), "resumed": resume, "commit": commit()}
    (job.folder / COST).write_text(json.dumps(cost) + "\n", encoding="utf-8")
    return job.folder, cost


def commit() -> str | None:
    """The commit of this checkout, if it is one."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
