"""The arms of the study, and the config of a run: what study.yaml and kinds.yaml say, with a rate and a seed."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from bases import Bases

HERE = Path(__file__).parent
ALL_LAYERS = {"targets": "all-linear"}


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of adapter as the policy."""

    name: str
    title: str
    policy: Mapping[str, Any]
    prepared: str | None = None  # a base and a first adapter of its own, made by the script of this name


@dataclass(frozen=True, slots=True)
class Task:
    """What the policy is to learn."""

    name: str
    title: str
    bound: float  # nats per response: evaluations farther from the reference don't count
    answer: str  # what its held-out reward is called
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """PPO steps of a run."""
        return int(self.config["ppo"]["steps"])


@cache
def read_kinds() -> dict[str, Kind]:
    """All kinds, in the order of kinds.yaml."""
    listed = yaml.safe_load((HERE / "kinds.yaml").read_text(encoding="utf-8"))
    return {name: Kind(name, **parts) for name, parts in listed.items()}


@cache
def read_study() -> dict[str, Any]:
    """study.yaml."""
    found: dict[str, Any] = yaml.safe_load((HERE / "study.yaml").read_text(encoding="utf-8"))
    return found


@cache
def read_tasks() -> dict[str, Task]:
    """The tasks, in the order of study.yaml."""
    return {name: Task(name, **parts) for name, parts in read_study()["tasks"].items()}


def config_of(task: Task, kind: Kind, bases: Bases, rate: float, seed: int) -> dict[str, Any]:
    """The whole config of one run."""
    config = deepcopy(read_study()["shared"] | dict(task.config))
    config["model"]["path"] = str(bases.base)
    config["data"] = {"prompts": str(bases.prompts(task.name))}
    config["eval"]["prompts"] = str(bases.heldout(task.name))
    if config["reward"]["use"] == "model":
        config["reward"]["path"] = str(bases.reward)
    config["policy"] = dict(kind.policy) | ALL_LAYERS
    if kind.prepared:  # the policy goes on from the adapter that, with this base, gives what the study's base gives
        config["model"]["path"] = str(bases.prepared(kind.prepared) / "base")
        adapter = str(bases.prepared(kind.prepared) / "adapter")
        config["policy"] = dict(kind.policy) | {"from": adapter}
        config["reference"] = {"use": "peft-adapter", "adapter": adapter}
    config["ppo"]["learning_rate"] = rate
    config["run"]["seed"] = seed
    return config
