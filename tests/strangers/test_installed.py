"""A stranger's package, really installed (`make third-party`): found by its entry point and named by a config."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from marl_core.cli.app import main
from marl_core.testing import write_tiny_model

pytestmark = pytest.mark.installed


def test_a_config_names_the_installed_strategy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert metadata.version("acme-marl")
    model = write_tiny_model(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"film {i}"}) for i in range(8)), encoding="utf-8")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: {model}, dtype: float32}}\n"
        "reference: disabled-adapter\n"
        "reward: {use: brevity, target: 4}\n"
        f"data: {{prompts: {prompts}}}\n"
        "sampling: {max_new_tokens: 8}\n"
        "ppo: {steps: 2, batch: 4, minibatch: 2}\n"
        f"run: {{folder: {tmp_path / 'run'}, device: cpu}}\n",
        encoding="utf-8",
    )
    assert main(["run", str(config)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0 < line["reward/brevity"] <= 1 for line in lines)
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text(encoding="utf-8"))
    assert any("acme-marl 0.1.0" in strategy for strategy in provenance["strategies"])
    assert "bitwise 0" in capsys.readouterr().out
