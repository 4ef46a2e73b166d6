"""The study's pieces, in stages. A stage is asked for when those before it are done, because the rates of its runs follow from them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import probe
import protocol
import trial
from bases import Bases, make_bases
from full_weights import compare
from kinds import Kind, Task, config_of, read_kinds, read_tasks
from pieces import Piece

Stage = Callable[[], list[Piece]]


@dataclass(frozen=True, slots=True)
class Extent:
    """How long everything is."""

    base: dict[str, int]
    changes: dict[str, dict[str, Any]]  # of a run's config, by section


FULL = Extent({}, {})
FAST = Extent({"base_steps": 20, "reward_steps": 4}, {"ppo": {"steps": 2}, "eval": {"every": 1, "limit": 8}})


@dataclass(frozen=True, slots=True)
class Study:
    """Where the study is kept, and how long it is."""

    folder: Path
    extent: Extent = FULL

    @property
    def bases(self) -> Bases:
        """What the runs stand on."""
        return Bases(self.folder / "bases")

    def stages(self) -> Iterator[tuple[str, Stage]]:
        """All stages in order, with a title."""
        yield "Bases, judge and prompts", self._bases
        for task in read_tasks().values():
            yield f"{task.name}: the size of a first step", lambda task=task: self.probes(task)
            for size in ("middle", "small", "large"):
                yield f"{task.name}: {size} steps", lambda task=task, size=size: self.tried(task, size)
            for seed in protocol.SEEDS[1:]:
                yield f"{task.name}: best rates, seed {seed}", lambda task=task, seed=seed: self.repeated(task, seed)
            yield f"{task.name}: one rate for all", lambda task=task: self.one_rate(task)
        yield "The step of full fine-tuning", self.full_weights

    def _bases(self) -> list[Piece]:
        arguments = {"folder": str(self.bases.folder)} | self.extent.base
        return [Piece("bases", self.folder / "bases.json", make_bases, arguments)]

    def probes(self, task: Task) -> list[Piece]:
        """Each kind's rates for the three sizes."""
        return [self.probe(task, kind) for kind in read_kinds().values()]

    def probe(self, task: Task, kind: Kind) -> Piece:
        """One kind's rates."""
        config = self._config(task, kind, protocol.FIRST_RATE, 0)
        return self._piece(task, kind, "steps", probe.rates, {"config": config, "sizes": protocol.SIZES})

    def tried(self, task: Task, size: str) -> list[Piece]:
        """Each kind with steps of one size, seed 0."""
        found = [self.run(task, kind, size) for kind in read_kinds().values()]
        return [piece for piece in found if piece]

    def run(self, task: Task, kind: Kind, size: str, seed: int = 0) -> Piece | None:
        """A run with steps of one size; None before the probe is done."""
        step = self.probe(task, kind)
        if not step.finished:
            return None
        return self._run(task, kind, f"{size}-{seed}", step.result["rates"][size], seed)

    def best(self, task: Task, kind: Kind) -> str | None:
        """The size that scored best with seed 0; None while one isn't done."""
        runs = {size: self.run(task, kind, size) for size in protocol.SIZES}
        if not all(piece and piece.finished for piece in runs.values()):
            return None
        return protocol.best({size: piece.result["evals"] for size, piece in runs.items() if piece}, task.bound)

    def repeated(self, task: Task, seed: int) -> list[Piece]:
        """Each kind at its best rate with another seed."""
        chosen = [(kind, self.best(task, kind)) for kind in read_kinds().values()]
        found = [self.run(task, kind, size, seed) for kind, size in chosen if size]
        return [piece for piece in found if piece]

    def one_rate(self, task: Task) -> list[Piece]:
        """Each kind at the rate that is the yardstick's best."""
        yardstick = read_kinds()[protocol.YARDSTICK]
        size = self.best(task, yardstick)
        if size is None:
            return []
        rate = self.probe(task, yardstick).result["rates"][size]
        return [self._run(task, kind, "one-0", rate, 0) for kind in read_kinds().values() if kind != yardstick]

    def full_weights(self) -> list[Piece]:
        """How large a step of all weights is beside one of LoRA."""
        kind = read_kinds()[protocol.YARDSTICK]
        return [
            Piece(
                f"{task.name}/full-weights",
                self.folder / task.name / "full-weights.json",
                compare,
                {"config": self._config(task, kind, protocol.FIRST_RATE, 0)},
            )
            for task in read_tasks().values()
        ]

    def _run(self, task: Task, kind: Kind, label: str, rate: float, seed: int) -> Piece:
        return self._piece(task, kind, label, trial.run, {"config": self._config(task, kind, rate, seed)})

    def _piece(
        self, task: Task, kind: Kind, label: str, make: Callable[..., dict[str, Any]], arguments: dict[str, Any]
    ) -> Piece:
        name = f"{task.name}/{kind.name}/{label}"
        return Piece(name, self.folder / f"{name}.json", make, arguments)

    def _config(self, task: Task, kind: Kind, rate: float, seed: int) -> dict[str, Any]:
        config = config_of(task, kind, self.bases, rate, seed)
        for section, changes in self.extent.changes.items():
            config[section] |= changes
        return config
