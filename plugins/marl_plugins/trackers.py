"""Experiment trackers: accelerate's classes for them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from marl_core import flatten

if TYPE_CHECKING:
    from marl_core import Evaluation, Plan, StepStats
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

OF_THE_EXTRA = ("tensorboard",)
"""Those that `marl-core[trackers]` brings."""


def problems(names: Iterable[str], settings: Mapping[str, Any]) -> Iterable[str]:
    """Why a tracker can't be opened."""
    for name in names:
        if name not in PACKAGES:
            yield f"observers: trackers: accelerate has no tracker {name!r}; it has {', '.join(PACKAGES)}"
        elif not any(find_spec(package) for package in PACKAGES[name]):
            package = "'marl-core[trackers]'" if name in OF_THE_EXTRA else PACKAGES[name][0]
            yield f"observers: trackers: {name} isn't installed; install it with: pip install {package}"
    for name in sorted(set(settings) - set(names)):
        yield f"observers: trackers: settings are given for {name!r}, which isn't in `to`"


class OpenTrackers:
    """The trackers of one run, from its first step to its end: accelerate's classes, without its Accelerator.

    Accelerator's `end_training` would destroy the process group, which belongs to the run and to those after it.
    """

    def __init__(self, plan: Plan, options: Trackers, done: int) -> None:
        """Open them and tell them the config, as dotted keys."""
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

        PartialState(cpu=plan.config.run.device == "cpu")  # accelerate's classes ask it who is the first process
        folder = os.path.expanduser(plan.config.run.folder or ".")
        self._trackers: list[Any] = []
        for name in map(str, filter_trackers(list(options.to), folder)):
            tracker_class = LOGGER_TYPE_TO_CLASS[name]
            location = (folder,) if tracker_class.requires_logging_directory else ()
            self._trackers.append(tracker_class(options.project, *location, **options.settings.get(name, {})))
        config_keys = flatten(plan.config.model_dump(mode="json", by_alias=True))
        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in config_keys.items()
        }
        config = {**plain, "resumed_at": done}
        for tracker in self._trackers:
            if hasattr(tracker, "start"):  # before accelerate 1.11 the constructor starts it
                tracker.start()
            tracker.store_init_configuration(config)

    def log(self, stats: StepStats) -> None:
        """A step's numbers."""
        self._log(stats.metrics, stats.step)

    def evaluation(self, evaluation: Evaluation) -> None:
        """Held-out numbers under eval/."""
        judge_means = {f"eval/{name}": judge["mean"] for name, judge in evaluation.judges.items()}
        numbers = {
            "reward": evaluation.reward,
            "kl": evaluation.kl,
            "length": evaluation.length,
            "finished": evaluation.finished,
        }
        self._log({**{f"eval/{name}": value for name, value in numbers.items()}, **judge_means}, evaluation.step)

    def close(self, error: BaseException | None = None) -> None:
        """The end. A run that failed or was stopped is marked so where the tracker has a word for it."""
        for tracker in self._trackers:
            end = _UNFINISHED.get(tracker.name) if error is not None else None
            if end is not None and error is not None:
                end(tracker, error)
            else:
                tracker.finish()
        self._trackers = []

    def _log(self, numbers: Mapping[str, float | None], step: int) -> None:
        """What isn't finite is left out, since not every tracker takes it."""
        finite = {name: value for name, value in numbers.items() if value is not None and math.isfinite(value)}
        for tracker in self._trackers:
            tracker.log(finite, step=step)


def _wandb(tracker: Any, error: BaseException) -> None:
    tracker.tracker.finish(exit_code=getattr(error, "exit_code", 0 if isinstance(error, GeneratorExit) else 1))


def _mlflow(tracker: Any, error: BaseException) -> None:
    import mlflow

    stopped = isinstance(error, KeyboardInterrupt | GeneratorExit) or getattr(error, "exit_code", 0) > SIGNAL_EXIT_CODE
    mlflow.end_run(status="KILLED" if stopped else "FAILED")


_UNFINISHED = {"wandb": _wandb, "mlflow": _mlflow}
SIGNAL_EXIT_CODE = 128
"""Exit codes above it are those of runs that a signal ended."""
