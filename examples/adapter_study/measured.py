"""The study's numbers: gathered from the finished pieces into `results/`, and read from there by figures and page."""

import json
import platform
import statistics
from collections.abc import Iterable, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import protocol
from kinds import HERE, read_kinds, read_tasks

RESULTS = HERE / "results"
LIBRARIES = ("torch", "transformers", "peft")
Row = dict[str, Any]


def collect(study: Any) -> None:
    """Write results/probes.jsonl, runs.jsonl, full.jsonl and machine.json from all finished pieces of a study."""
    rows: dict[str, list[Row]] = {"probes": [], "runs": [], "full": []}
    commits, seconds = set(), 0.0
    for _, stage in study.stages():
        for piece in stage():
            if not piece.finished:
                continue
            written = json.loads(piece.file.read_text(encoding="utf-8"))
            commits.add(written["commit"])
            result = written["result"]
            seconds += result["cpu_seconds"]
            who = dict(zip(("task", "kind", "label"), piece.name.split("/"), strict=False))
            if who.get("kind") == "full-weights":
                rows["full"] += [{"task": who["task"]} | step for step in result["steps"]]
            elif who.get("label") == "steps":
                rows["probes"].append({"task": who["task"], "kind": who["kind"]} | result)
            elif "label" in who:
                size, _, seed = who["label"].rpartition("-")
                rate = written["arguments"]["config"]["ppo"]["learning_rate"]
                rows["runs"].append(
                    {"task": who["task"], "kind": who["kind"], "size": size, "seed": int(seed), "rate": rate} | result
                )
    for name, found in rows.items():
        write(RESULTS / f"{name}.jsonl", found)
    machine = {
        "machine": processor(),
        "threads of a run": 1,
        "cpu_seconds": round(seconds),
        "commits": sorted(commit for commit in commits if commit),
        "versions": {name: version(name) for name in ("marl-core", *LIBRARIES)},
    }
    (RESULTS / "machine.json").write_text(json.dumps(machine, indent=2) + "\n", encoding="utf-8")


def write(file: Path, rows: Iterable[Row]) -> None:
    """Write a JSON-lines file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


class Measured:
    """What `results/` holds."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder

    @cached_property
    def runs(self) -> list[Row]:
        """One row for each run."""
        return self._read("runs")

    @cached_property
    def probes(self) -> dict[tuple[str, str], Row]:
        """A kind's rates on a task, and the sizes measured."""
        return {(row["task"], row["kind"]): row for row in self._read("probes")}

    @cached_property
    def full(self) -> list[Row]:
        """First steps of all weights and of LoRA at ten times the rate."""
        return self._read("full")

    @cached_property
    def machine(self) -> Mapping[str, Any]:
        """Machine, versions, commits, seconds of everything."""
        found: dict[str, Any] = json.loads((self.folder / "machine.json").read_text(encoding="utf-8"))
        return found

    def tasks(self) -> list[str]:
        """Tasks of which a kind was chosen a rate."""
        return [task for task in read_tasks() if self.kinds(task)]

    def kinds(self, task: str) -> list[str]:
        """Kinds with a run of every size, in the order of kinds.yaml."""
        return [kind for kind in read_kinds() if set(self.by_size(task, kind)) == set(protocol.SIZES)]

    def by_size(self, task: str, kind: str) -> dict[str, Row]:
        """The runs with seed 0 that a rate is chosen from."""
        mine = [row for row in self.runs if (row["task"], row["kind"], row["seed"]) == (task, kind, 0)]
        return {row["size"]: row for row in mine if row["size"] in protocol.SIZES}

    def best_size(self, task: str, kind: str) -> str:
        """The size that scores best."""
        runs = {size: row["evals"] for size, row in self.by_size(task, kind).items()}
        return protocol.best(runs, read_tasks()[task].bound)

    def best_runs(self, task: str, kind: str) -> list[Row]:
        """The runs at the best rate, one a seed."""
        size = self.best_size(task, kind)
        return [row for row in self.runs if (row["task"], row["kind"], row["size"]) == (task, kind, size)]

    def at_one_rate(self, task: str, kind: str) -> Row | None:
        """The run at the yardstick's best rate, seed 0."""
        if kind == protocol.YARDSTICK:
            return self.by_size(task, kind)[self.best_size(task, kind)]
        found = [row for row in self.runs if (row["task"], row["kind"], row["size"]) == (task, kind, "one")]
        return found[0] if found else None

    def score(self, row: Row) -> float:
        """One run in a number."""
        return protocol.score(row["evals"], read_tasks()[row["task"]].bound)

    def scores(self, task: str, kind: str) -> list[float]:
        """The best rate's runs, one number a seed."""
        return [self.score(row) for row in self.best_runs(task, kind)]

    def start(self, task: str) -> float:
        """The held-out reward before training."""
        return float(statistics.median(row["evals"][0]["reward"] for row in self.runs if row["task"] == task))

    def step_at(self, task: str, kind: str, rate: float) -> float:
        """The size of a first step at a rate, taken as proportional to the rate."""
        return float(self.probes[task, kind]["at_first_rate"] * rate / protocol.FIRST_RATE)

    def fate(self, row: Row) -> str:
        """What went wrong in a run: it broke, it ended no better than it began, or farther from the reference than counts; or nothing."""
        last, first = row["evals"][-1], row["evals"][0]
        if row["broken"]:
            return "broke"
        if last["reward"] <= first["reward"]:
            return "collapsed"
        return "too far" if last["kl"] > read_tasks()[row["task"]].bound else ""

    def collapsed(self, row: Row) -> bool:
        """Whether a run broke, or ended no better than it began."""
        return self.fate(row) in ("broke", "collapsed")

    def _read(self, name: str) -> list[Row]:
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
