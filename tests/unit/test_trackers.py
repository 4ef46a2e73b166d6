"""Trackers by config: tensorboard's event file read back; what isn't installed is said, not dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marl_core import Plan, Runner
from marl_plugins.trackers import problems

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


def test_tensorboard_holds_what_steps_jsonl_holds(
    make_config: Callable[..., Any], prompts_file: str, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    observers = [{"use": "trackers", "to": ["tensorboard"], "project": "tiny"}]
    config = make_config(run={"folder": str(tmp_path / "run")}, observers=observers, eval={"prompts": prompts_file})
    assert not Plan.of(config).check()
    seen = list(_train(config))
    (file,) = [path for path in (tmp_path / "run").rglob("events.*") if path.parent.name == "tiny"]
    events = EventAccumulator(str(file)).Reload()
    for name in ("objective/scores", "objective/kl", "policy/clipfrac", "val/explained_var", "perf/seconds"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [1, 2]
        assert [value for _, value in found] == pytest.approx([stats[name] for stats in seen], rel=1e-5, abs=1e-7)
    assert [event.step for event in events.Scalars("eval/reward")] == [2]
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
        assert b"objective/scores" in file.read_bytes()
    else:
        import sqlite3

        files = list((tmp_path / "trackio").rglob("*.db"))
        assert files
        rows = sqlite3.connect(files[0]).execute("select metrics from metrics").fetchall()
        assert any("objective/scores" in str(row) for row in rows)
