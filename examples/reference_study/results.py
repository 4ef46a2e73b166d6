"""The study's numbers: gathered from the run folders into `results/`, and read from there by figures and page."""

import json
import math
import platform
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from arms import CONFIG, HERE, SEEDS, read_arms

RESULTS = HERE / "results"
STEP = {  # name here: name in steps.jsonl
    "reward": "objective/scores",
    "kl": "objective/kl",
    "entropy": "objective/entropy",
    "clipfrac": "policy/clipfrac",
    "explained_var": "val/explained_var",
    "value_loss": "val/loss",
}
RAW_REFERENCE = ("c", "d")  # arms whose reference is the raw base; all others' is the SFT model
TOKENS = 16
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "trl")


def collect(runs: Path) -> None:
    """Write results/steps.jsonl, evals.jsonl, samples.jsonl and machine.json from all finished runs."""
    steps, evals, samples, costs, commits = [], [], [], [], set()
    for folder in sorted((runs / "arms").glob("*-[0-9]")):
        if not (folder / "cost.json").is_file():
            continue
        arm, _, seed = folder.name.rpartition("-")
        who = {"arm": arm, "seed": int(seed)}
        for line in read(folder / "steps.jsonl"):
            steps.append(who | {"step": line["step"]} | {n: _short(line[k]) for n, k in STEP.items() if k in line})
        for line in read(folder / "evals.jsonl"):
            judges = {name: _short(judge["mean"]) for name, judge in line["judges"].items()}
            evals.append(
                who | {"step": line["step"], "reward": _short(line["reward"]), "kl": _short(line["kl"])} | judges
            )
            samples += [
                who
                | {
                    "step": line["step"],
                    "prompt": one["prompt"],
                    "response": one["response"],
                    "score": _short(one["score"]),
                }
                for one in line["samples"]
                if seed == "0" and line["step"]
            ]
        cost = json.loads((folder / "cost.json").read_text(encoding="utf-8"))
        commits.add(cost.pop("commit", None))
        costs.append(who | cost)
    for name, rows in {"steps": steps, "evals": evals, "samples": samples, "costs": costs}.items():
        write(RESULTS / f"{name}.jsonl", rows)
    machine = {
        "machine": f"{_processor()}, 2 cores" if platform.system() == "Linux" else platform.processor(),
        "threads of a run": 1,
        "commits": sorted(commit for commit in commits if commit),
        "versions": {name: version(name) for name in ("marl-core", *LIBRARIES)},
    }
    (RESULTS / "machine.json").write_text(json.dumps(machine, indent=2) + "\n", encoding="utf-8")


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSON-lines file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _short(number: float) -> float:
    return float(f"{number:.5g}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds."""

    mean: float
    std: float | None
    count: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Over these values, one a seed."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


class Results:
    """What `results/` holds, by arm, seed and step."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder

    @cached_property
    def config(self) -> dict[str, Any]:
        """What all arms share: study.yaml."""
        found: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
        return found

    @property
    def tokens(self) -> int:
        """Tokens of each response."""
        return TOKENS

    @property
    def runs(self) -> int:
        """How many runs there are."""
        return len(self.costs)

    @property
    def planned(self) -> int:
        """How many there are to be."""
        return len(read_arms()) * len(SEEDS)

    def has(self, name: str) -> bool:
        """Whether a part was measured."""
        return (self.folder / f"{name}.jsonl").is_file()

    @property
    def seed_count(self) -> str:
        """Seeds of each arm: one number, or from which to which."""
        counts = [len({row["seed"] for row in self.evals if row["arm"] == arm}) for arm in self.arms()]
        return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """One row for each step of each run."""
        return read(self.folder / "steps.jsonl")

    @cached_property
    def evals(self) -> list[dict[str, Any]]:
        """One row for each evaluation, with what follows from its numbers: KL to both models, perplexity."""
        return [row | _derived(row) for row in read(self.folder / "evals.jsonl")]

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Texts of the evaluations, seed 0."""
        return read(self.folder / "samples.jsonl")

    @cached_property
    def costs(self) -> list[dict[str, Any]]:
        """CPU seconds of each run."""
        return read(self.folder / "costs.jsonl")

    @cached_property
    def layouts(self) -> list[dict[str, Any]]:
        """Memory and seconds a step of each layout (costs.py)."""
        return read(self.folder / "layouts.jsonl")

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """Start models against the exact one (starts.py)."""
        return read(self.folder / "starts.jsonl")

    @cached_property
    def machine(self) -> dict[str, Any]:
        """Machine, versions, commits."""
        found: dict[str, Any] = json.loads((self.folder / "machine.json").read_text(encoding="utf-8"))
        return found

    def arms(self) -> list[str]:
        """Arms with results, in the order of arms.yaml."""
        there = {row["arm"] for row in self.evals}
        return [name for name in read_arms() if name in there]

    def last(self, arm: str) -> int:
        """The last step that was evaluated."""
        return max(row["step"] for row in self.evals if row["arm"] == arm)

    def at(self, arm: str, metric: str, step: int | None = None) -> Spread:
        """A held-out number after `step` steps; None: at the end."""
        when = self.last(arm) if step is None else step
        return Spread.of([row[metric] for row in self.evals if row["arm"] == arm and row["step"] == when])

    def late(self, arm: str, metric: str, steps: int = 10) -> Spread:
        """A number of training, averaged over each run's last steps."""
        rows = [row for row in self.steps if row["arm"] == arm]
        first = max(row["step"] for row in rows) - steps
        seeds = sorted({row["seed"] for row in rows})
        return Spread.of(
            [statistics.fmean(r[metric] for r in rows if r["seed"] == seed and r["step"] > first) for seed in seeds]
        )

    def curve(self, arm: str, metric: str, held_out: bool = False) -> dict[int, Spread]:
        """A number of training, or else (always if `held_out`) of evaluation, over steps."""
        rows = self.evals if held_out or metric not in STEP else self.steps
        mine = [row for row in rows if row["arm"] == arm and metric in row]
        steps = sorted({row["step"] for row in mine})
        return {step: Spread.of([row[metric] for row in mine if row["step"] == step]) for step in steps}


def _derived(row: dict[str, Any]) -> dict[str, float]:
    """KL(policy || M) = KL(policy || reference) + E[log reference] - E[log M], in nats per response."""
    reference = row["logp_raw"] if row["arm"] in RAW_REFERENCE else row["logp_sft"]
    return {
        "kl_sft": row["kl"] + reference - row["logp_sft"],
        "kl_raw": row["kl"] + reference - row["logp_raw"],
        "perplexity": math.exp(-row["logp_sft"] / TOKENS),
    }
