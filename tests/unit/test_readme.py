"""The README's first screen is true: its YAML is a config, its Python runs, its table is the quickstart's."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from marl_core import AdapterBank, Plan, RunConfig
from marl_core.cli.app import main
from marl_core.config.load import parse_config
from marl_core.config.yaml_text import parse_yaml
from marl_core.registry.catalog import Catalog
from marl_core.registry.families import FAMILIES
from marl_core.testing import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, flags=re.DOTALL)


def test_the_yaml_is_ten_lines_and_a_valid_config() -> None:
    (text,) = blocks("yaml")
    assert len(text.strip().splitlines()) <= 10
    plan = Plan.of(parse_config(parse_yaml(text, "README.md"), "README.md", Catalog.installed()))
    assert plan.config.reference.label == "merged-base"


def test_the_yaml_says_what_the_quickstart_runs() -> None:
    shown: dict[str, Any] = parse_yaml(blocks("yaml")[0], "README.md")
    runs: dict[str, Any] = parse_yaml((ROOT / "examples/quickstart/ppo.yaml").read_text(encoding="utf-8"), "ppo.yaml")
    for key in ("model", "policy", "reference", "reward", "value", "data", "sampling", "ppo"):
        assert _same(shown[key], runs[key]), key


def test_the_first_commands_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"^make (\S+)", blocks("sh")[2], flags=re.MULTILINE)) == {"quickstart", "test"} <= targets


def test_it_begins_with_install_check_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order, and the config is there and right."""
    install, first, _ = blocks("sh")
    assert "pip install -e" in install
    commands = [shlex.split(line, comments=True) for line in first.splitlines()]
    assert [words[:2] for words in commands] == [["marl", "check"], ["marl", "run"]]
    monkeypatch.chdir(ROOT)
    assert main(commands[0][1:]) == 0
    assert commands[0][2] == commands[1][2]


def test_the_runner_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_model("my-model")
    Path("prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"film {i}"}) for i in range(8)), encoding="utf-8")
    Path("rewards.py").write_text(
        "def brevity(completions, **_):\n    return [-float(len(c)) for c in completions]\n", encoding="utf-8"
    )
    exec(compile(blocks("python")[0], "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["1", "2"]


def test_the_classic_call_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForSequenceClassification

    monkeypatch.chdir(tmp_path)
    write_tiny_model("my-model")
    classifier = AutoModelForSequenceClassification.from_pretrained("my-model", num_labels=1)
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    get_peft_model(classifier, lora).save_pretrained("my-reward-adapter")
    names: dict[str, Any] = {}
    exec(compile(blocks("python")[1], "README.md", "exec"), names)
    assert isinstance(names["bank"], AdapterBank)
    judge = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained("my-model", num_labels=1), "my-reward-adapter"
    ).eval()
    judge.config.pad_token_id = 0
    for text, score in zip(
        ("A good film.", "Bad"), names["scores"], strict=True
    ):  # each alone, by transformers and peft
        with torch.no_grad():
            wanted = judge(input_ids=torch.tensor([names["bank"].tokenizer(text).input_ids])).logits[0, 0]
        assert float(score) == pytest.approx(float(wanted), abs=1e-5)


def test_the_table_of_choices_has_every_family_with_what_is_built_in() -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) \|", README, flags=re.MULTILINE))
    for family in FAMILIES.values():
        built_in = [found.name for found in Catalog.installed().listings(family.name) if found.package == "marl-core"]
        assert set(built_in) == set(re.findall(r"`([\w-]+)`", rows[family.key.path])), family.name


def test_run_config_is_public() -> None:
    assert RunConfig.__name__ in README


def _same(shown: Any, runs: Any) -> bool:
    """Whether everything that is shown is what runs; sections may show less."""
    if isinstance(shown, dict) and isinstance(runs, dict):
        return all(name in runs and _same(value, runs[name]) for name, value in shown.items())
    return bool(shown == runs)


def test_the_pages_examples_of_rewards_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    page = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
    function, in_python, certify = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(function, "docs/rewards.md", "exec"), names)
    assert names["brevity"](["a"], ["b"], [[1, 2, 3, 4]], 2, other=[0]) == [0.5]

    exec(compile(in_python, "docs/rewards.md", "exec"), names)

    monkeypatch.chdir(tmp_path)
    write_tiny_model("my-base")
    classifier = AutoModelForSequenceClassification.from_pretrained("my-base", num_labels=1)
    get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])).save_pretrained(
        "my-reward-adapter"
    )
    exec(compile(certify, "docs/rewards.md", "exec"), {})
    bank = AdapterBank.from_pretrained("my-base")
    bank.load_reward("my-reward-adapter")
    assert "2 golden scores match" in bank.reward_checks["reward"]

    (tmp_path / "rewards.py").write_text(function, encoding="utf-8")
    (listed,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    written = {"model": {"path": "my-base"}, "reference": "disabled-adapter", **parse_yaml(listed, "docs/rewards.md")}
    plan = Plan.of(parse_config(written, "docs/rewards.md", Catalog.installed()))
    assert [choice.weight for choice, _ in plan.rewards] == [1.0, 0.2]


def test_the_table_is_what_the_quickstart_printed() -> None:
    """examples/quickstart/result.md is the table.md of one run of `make quickstart`, kept as it was written."""
    result = (ROOT / "examples/quickstart/result.md").read_text(encoding="utf-8").strip()
    assert result in README
    steps = parse_yaml((ROOT / "examples/quickstart/ppo.yaml").read_text(encoding="utf-8"), "ppo.yaml")["ppo"]["steps"]
    assert f"after (step {steps})" in result
