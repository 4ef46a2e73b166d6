"""Trackers by config: tensorboard's event file read back; what isn't installed is said, not dropped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from marl_core import Plan, Runner
from marl_core.errors import Stopped
from marl_plugins.observers import Trackers
from marl_plugins.trackers import problems

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


def test_tensorboard_holds_what_steps_jsonl_holds(
    make_config: Callable[..., Any], prompts_file: str, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    observers = [{"use": "trackers", "to": ["tensorboard"], "project": "tiny"}]
    config = make_config(
        run={"folder": str(tmp_path / "run")}, observers=observers, eval={"prompts": prompts_file, "every": 1}
    )
    assert not Plan.of(config).check()
    seen = list(_train(config))
    (file,) = [path for path in (tmp_path / "run").rglob("events.*") if path.parent.name == "tiny"]
    events = EventAccumulator(str(file)).Reload()
    for name in ("objective/scores", "objective/kl", "policy/clipfrac", "val/explained_var", "perf/seconds"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [1, 2]
        assert [value for _, value in found] == pytest.approx([stats[name] for stats in seen], rel=1e-5, abs=1e-7)
    held_out = [json.loads(line) for line in (tmp_path / "run" / "evals.jsonl").read_text().splitlines()]
    assert [line["step"] for line in held_out] == [0, 1, 2]
    for name in ("reward", "kl", "length"):
        found = [(event.step, event.value) for event in events.Scalars(f"eval/{name}")]
        assert found == [(line["step"], pytest.approx(line[name], rel=1e-5, abs=1e-7)) for line in held_out]
    (written,) = (tmp_path / "run").rglob("hparams.yml")
    assert "ppo.kl.coef: 0.2" in written.read_text(encoding="utf-8")


def _train(config: Any) -> Any:
    """The stats of each step of a whole run."""
    seen: list[Any] = []
    runner = Runner(config)
    finish = runner.finish
    runner.finish = lambda *given: seen.append(finish(*given)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    runner.train()
    return seen


def test_a_tracker_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marl_plugins.trackers.find_spec", lambda name: None)
    said = list(problems(["wandb", "tensorbord"], {"mlflow": {}}))
    assert "wandb isn't installed; install it with: pip install wandb" in said[0]
    assert "no tracker 'tensorbord'" in said[1]
    assert "settings are given for 'mlflow'" in said[2]


def test_the_process_group_is_there_for_the_next_run(make_config: Callable[..., Any], tmp_path: Path) -> None:
    """Several processes train twice in one script: what the first run's trackers close is theirs alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for name in "ab":
            observers = [{"use": "trackers", "to": ["tensorboard"]}]
            Runner(make_config(run={"folder": str(tmp_path / name)}, observers=observers, ppo={"steps": 1})).train()
            assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


class Tracker:
    """Any of accelerate's trackers: what it is told."""

    requires_logging_directory = False

    def __init__(self, project: str, **settings: Any) -> None:
        self.heard: list[Any] = []
        self.tracker = SimpleNamespace(finish=lambda exit_code: self.heard.append(exit_code))
        ALL.append(self)

    def store_init_configuration(self, config: Any) -> None:
        self.heard.append("config")

    def log(self, numbers: Any, step: int) -> None:
        self.heard.append((step, numbers))

    def finish(self) -> None:
        self.heard.append("finished")


ALL: list[Tracker] = []


@pytest.mark.parametrize(
    ("error", "heard"),
    [
        (None, "finished"),
        (RuntimeError("no"), 1),
        (Stopped("stopped", 15), 143),
        (GeneratorExit(), 0),
        (KeyboardInterrupt(), 1),
    ],
)
def test_a_run_that_failed_is_marked_so(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: BaseException | None, heard: Any
) -> None:
    """wandb's exit code; nothing is logged that isn't a number."""
    kind = type("WandB", (Tracker,), {"name": "wandb"})
    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {"wandb": kind})
    monkeypatch.setattr("accelerate.tracking.filter_trackers", lambda names, folder: names)
    observer = Trackers(to=["wandb"])
    observer.marl_run_start(Plan.of(make_config()), 0)
    observer.marl_step_end(SimpleNamespace(step=1, metrics={"a": 1.0, "b": float("nan"), "c": None}))  # type: ignore[arg-type]
    found: dict[str, Any] = {"step": 1, "reward": 1.0, "kl": 0.0, "length": 3.0, "finished": 1.0}
    judges = {"mean": {"mean": 2.0}, "silent": {"mean": None}}
    observer.marl_evaluation_end(SimpleNamespace(**found, judges=judges))  # type: ignore[arg-type]
    observer.marl_run_end() if error is None else observer.marl_run_failed(error)
    numbers = {"eval/reward": 1.0, "eval/kl": 0.0, "eval/length": 3.0, "eval/finished": 1.0, "eval/mean": 2.0}
    assert ALL.pop().heard == ["config", (1, {"a": 1.0}), (1, numbers), heard]


@pytest.mark.trackers
@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_the_others_offline(
    name: str, make_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make trackers` installs them."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = {
        "wandb": {"mode": "offline", "dir": str(tmp_path)},
        "mlflow": {"run_name": "first"},
        "trackio": {"name": "first"},
    }
    observers = [{"use": "trackers", "to": [name], "settings": {name: settings[name]}, "project": "tiny"}]
    config = make_config(run={"folder": str(tmp_path / "run")}, observers=observers)
    seen = _train(config)
    if name == "mlflow":
        import mlflow

        (experiment,) = [found for found in mlflow.search_experiments() if found.name == "tiny"]
        (run,) = mlflow.MlflowClient().search_runs([experiment.experiment_id])
        assert run.data.metrics["objective/scores"] == pytest.approx(seen[-1].reward_mean)
        assert run.data.params["ppo.kl.coef"] == "0.2"
    elif name == "wandb":
        (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
        end = time.monotonic() + 60
        while (
            b"objective/scores" not in file.read_bytes()
        ):  # wandb's own process writes it, after the run has been told that it ended
            assert time.monotonic() < end
            time.sleep(0.1)
    else:
        import sqlite3

        files = list((tmp_path / "trackio").rglob("*.db"))
        assert files
        rows = sqlite3.connect(files[0]).execute("select metrics from metrics").fetchall()
        assert any("objective/scores" in str(row) for row in rows)
