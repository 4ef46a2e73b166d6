"""Experiment trackers, opened through accelerate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marl_core import Plan, RunResult, StepStats
    from marl_plugins.observers import Trackers

PACKAGES = {
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""The trackers accelerate knows, and the packages one of which each needs: accelerate leaves out the others in silence."""


def problems(names: Iterable[str], settings: Mapping[str, Any]) -> Iterable[str]:
    """Why a tracker can't be opened."""
    for name in names:
        if name not in PACKAGES:
            yield f"observers: trackers: accelerate has no tracker {name!r}; it has {', '.join(PACKAGES)}"
        elif not any(find_spec(package) for package in PACKAGES[name]):
            yield f"observers: trackers: {name} isn't installed; install it with: pip install {PACKAGES[name][0]}"
    for name in sorted(set(settings) - set(names)):
        yield f"observers: trackers: settings are given for {name!r}, which isn't in `to`"


class Opened:
    """The trackers of one run, from its first step to its end."""

    def __init__(self, plan: Plan, asked: Trackers, done: int) -> None:
        """Open them and tell them the config, as dotted keys."""
        from accelerate import Accelerator

        folder = plan.config.run.folder or "."
        self._accelerator = Accelerator(
            log_with=list(asked.to), project_dir=folder, cpu=plan.config.run.device == "cpu"
        )
        config = {**_flat(plan.config.model_dump(mode="json", by_alias=True)), "resumed_at": done}
        self._accelerator.init_trackers(asked.project, config=config, init_kwargs={**asked.settings})

    def log(self, stats: StepStats) -> None:
        """A step's numbers; what isn't finite is left out, since not every tracker takes it."""
        self._accelerator.log(
            {name: value for name, value in stats.metrics.items() if math.isfinite(value)}, step=stats.step
        )

    def close(self, result: RunResult) -> None:
        """The last held-out numbers, then the end."""
        after = result.after
        if after is not None:
            judged = {f"eval/{name}": judge["mean"] for name, judge in after.judges.items()}
            numbers = {"eval/reward": after.reward, "eval/kl": after.kl, "eval/length": after.length, **judged}
            self._accelerator.log(numbers, step=result.steps)
        self._accelerator.end_training()


def _flat(value: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {place: value if isinstance(value, bool | int | float | str) else str(value)}
    inner = [_flat(part, f"{place}.{name}" if place else str(name)) for name, part in value.items()]
    return {key: leaf for part in inner for key, leaf in part.items()}
