"""Models and adapters by hub names that aren't on this machine: `marl check` says so, and counts nothing as if it weren't there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from marl_core import Plan, RunConfig
from marl_core.cli.app import main
from marl_core.config.load import dump_config
from marl_core.plan.describe import explain
from marl_core.plan.hub_names import not_here
from marl_core.plan.memory import estimate

MakeConfig = Callable[..., RunConfig]
FUNCTION = {"use": "function", "target": "os:getcwd"}


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize(
    ("changes", "key", "role", "who"),
    [
        ({"reward": {"use": "model", "path": "sft"}}, "reward.path", "reward model", "reward model (sft"),
        ({"reference": {"use": "model", "path": "sft"}}, "reference.path", "reference", "the reference (sft"),
        (
            {"reward": FUNCTION, "eval": {"judges": {"j": {"use": "model", "path": "sft"}}}},
            "eval.judges.j.path",
            "judge j",
            "judge j (sft",
        ),
    ],
)
def test_a_model_that_is_not_here(
    make_config: MakeConfig, changes: dict[str, Any], key: str, role: str, who: str
) -> None:
    plan = Plan.of(make_config(**changes))
    (note,) = not_here(plan)
    assert note.startswith(f"{key}: 'sft' is no folder here, so it is looked for on the hub")
    sentences = " ".join(explain(plan))
    assert f"Beside it, whole models of their own: {who}, its size isn't known here)." in sentences
    assert "Nothing is held twice" not in sentences
    (row,) = [row for row in estimate(plan).roles if row.name == role]
    assert (row.shared, row.what) == (0.0, "not counted: 'sft' isn't on this machine, so its size isn't known")


def test_an_adapter_that_is_not_here_is_held_on_the_base(make_config: MakeConfig) -> None:
    plan = Plan.of(make_config(reward={"use": "adapter", "path": "owner/adapter"}))
    assert [note.partition(" is no")[0] for note in not_here(plan)] == ["reward.path: 'owner/adapter'"]
    sentences = explain(plan)
    assert "policy, reference, reward adapter and value look through it, told apart by adapters" in sentences[0]
    assert sentences[1] == "Nothing is held twice: no role has a model of its own."
    (row,) = [row for row in estimate(plan).roles if row.name == "reward adapter"]
    assert "isn't on this machine" in row.what


def test_what_is_here_or_is_no_name_is_not_noted(make_config: MakeConfig, reward_adapter: str) -> None:
    assert not_here(Plan.of(make_config(reward=FUNCTION))) == []
    assert not_here(Plan.of(make_config(reward={"use": "adapter", "path": reward_adapter}))) == []


def test_check_tells_it(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(dump_config(make_config(reward={"use": "model", "path": "sft"})), encoding="utf-8")
    assert main(["check", "run.yaml", "--memory"]) == 0
    out = capsys.readouterr().out
    assert "note: reward.path: 'sft' is no folder here, so it is looked for on the hub" in out
    assert "nothing speaks against this run, as far as could be checked" in out
