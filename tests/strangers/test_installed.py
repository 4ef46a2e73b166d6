"""A stranger's package, really installed (`make third-party`): found by its entry point and named by a config."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from marl_core import AdvantageInputs, Catalog
from marl_core.cli.app import main
from marl_core.testing import check_strategy, write_tiny_model

pytestmark = pytest.mark.installed


def run(folder: Path, **changes: str) -> list[dict[str, Any]]:
    """A run on a tiny model, its config written out; the lines of its steps."""
    model = write_tiny_model(folder / "model")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"film {i}"}) for i in range(8)), encoding="utf-8")
    sections = {
        "model": f"{{path: {model}, dtype: float32}}",
        "reference": "disabled-adapter",
        "reward": "{use: brevity, target: 4}",
        "data": f"{{prompts: {prompts}}}",
        "sampling": "{max_new_tokens: 8}",
        "ppo": "{steps: 2, batch: 4, minibatch: 2}",
        "run": f"{{folder: {folder / 'run'}, device: cpu}}",
    }
    config = folder / "run.yaml"
    config.write_text("\n".join(f"{key}: {value}" for key, value in (sections | changes).items()), encoding="utf-8")
    assert main(["run", str(config)]) == 0
    return [json.loads(line) for line in (folder / "run" / "steps.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_config_names_the_installed_strategy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert metadata.version("acme-marl")
    lines = run(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0 < line["reward/brevity"] <= 1 for line in lines)
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text(encoding="utf-8"))
    assert any("acme-marl 0.1.0" in strategy for strategy in provenance["strategies"])
    assert "bitwise 0" in capsys.readouterr().out


def test_its_estimator_is_worked_by_hand() -> None:
    strategy = Catalog.installed().load("advantage", "dr-grpo").build({})
    check_strategy("advantage", strategy)
    # two prompts, two responses each: scores 1 and 3 (mean 2), 10 and 4 (mean 7); grpo would give 0.707 four times
    rewards = torch.tensor([[0.0, 1.0], [3.0, 0.0], [4.0, 6.0], [0.0, 4.0]])
    inputs = AdvantageInputs(rewards, rewards != 0, samples_per_prompt=2)
    hook: Any = strategy
    assert hook.marl_advantage().estimate(inputs).tolist() == [-1.0, 1.0, 3.0, -3.0]


def test_a_config_names_its_estimator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(tmp_path, ppo="{steps: 2, batch: 4, minibatch: 2, samples_per_prompt: 2, advantage: dr-grpo}")
    assert [line["step"] for line in lines] == [1, 2]
    assert "advantage dr-grpo needs no value function" in capsys.readouterr().out
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text(encoding="utf-8"))
    assert any("dr-grpo of acme-marl 0.1.0" in strategy for strategy in provenance["strategies"])


def test_what_its_estimator_needs_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: {path: owner/model}\nreference: disabled-adapter\nreward: brevity\nvalue: own\n"
        "data: {prompts: prompts.jsonl}\nppo: {advantage: acme-marl/dr-grpo}\n",
        encoding="utf-8",
    )
    assert main(["check", str(config)]) == 2
    said = capsys.readouterr().err
    assert "value: own is never used with ppo.advantage acme-marl/dr-grpo; write value: none" in said
    assert "advantage acme-marl/dr-grpo compares responses to one prompt: samples_per_prompt must be 2 or more" in said
