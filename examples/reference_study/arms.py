"""The arms of the study: what study.yaml and arms.yaml say, as commands that run one arm with one seed."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
CONFIG = HERE / "study.yaml"
SEEDS = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Where the ingredients are: folders, as text."""

    raw: str  # the base as it is published
    sft: str  # the SFT adapter, trained on `raw`
    merged: str  # `raw` with `sft` merged in
    reward: str  # the reward adapter, trained on `merged`
    reward_model: str  # `merged` with `reward` merged in: a model of its own
    prompts: str
    heldout: str

    def settings(self) -> dict[str, Any]:
        """The config keys that say where things are."""
        return {
            "model.path": self.raw,
            "reference.adapter": self.sft,
            "reward.path": self.reward_model,
            "data.prompts": self.prompts,
            "eval.prompts": self.heldout,
            "eval.judges.logp_sft.arguments.model": self.merged,
            "eval.judges.logp_raw.arguments.model": self.raw,
        }


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of training: a name, a title, and the config keys in which it differs from study.yaml."""

    name: str
    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    program: str | None = None  # a script of this folder instead of `marl run`

    def config(self, inputs: Inputs, seed: int, folder: Path, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The whole config of one run."""
        config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
        places = {"sft": inputs.sft, "reward": inputs.reward}
        changes = json.loads(json.dumps(dict(self.changes)))
        for changed in (inputs.settings(), changes, {"run.seed": seed, "run.folder": str(folder)}, more or {}):
            for key, value in changed.items():
                put(config, key, _filled(value, places))
        return dict(config)

    def command(self, config: Path, inputs: Inputs, resume: bool) -> list[str]:
        """The command line that runs it."""
        if self.program:
            return [sys.executable, str(HERE / self.program), str(config), inputs.merged, inputs.reward_model]
        return [sys.executable, "-m", "marl_core.cli", "run", str(config), *(["--resume"] if resume else [])]


def read_arms() -> dict[str, Arm]:
    """All arms, in the order of arms.yaml."""
    listed = yaml.safe_load((HERE / "arms.yaml").read_text(encoding="utf-8"))
    return {name: Arm(name, **parts) for name, parts in listed.items()}


def put(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; a section replaces the one that is there."""
    *path, last = key.split(".")
    for part in path:
        config = config.setdefault(part, {})
    config[last] = value


def _filled(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(one, places) for key, one in value.items()}
    return value.format(**places) if isinstance(value, str) else value
