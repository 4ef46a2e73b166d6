"""`marl init`: five answers make a config that `marl check` accepts, on a terminal and without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from marl_core import Catalog, Plan, RunConfig, load_config
from marl_core.cli.app import main
from marl_core.config.flatten import flatten
from marl_core.config.run_config import DataSection
from marl_core.config.schema import json_schema
from marl_core.config.yaml_text import parse_yaml


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    (tmp_path / "rewards.py").write_text("def score(completions, **columns):\n    return [0.0]\n", encoding="utf-8")
    return tmp_path


OPTIONS = ["--base", "owner/model", "--reward", "rewards.py:score", "--data", "prompts.jsonl"]


@pytest.mark.parametrize("memory", ["full", "4bit"])
def test_by_options(folder: Path, memory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "run.yaml", *OPTIONS, "--memory", memory]) == 0
    assert main(["check", "run.yaml"]) == 0
    assert "nothing speaks against this run" in capsys.readouterr().out
    text = (folder / "run.yaml").read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=marl.schema.json\n")
    sections = [line for line in text.splitlines() if line and not line.startswith(("#", " "))]
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert len(comments) >= len(sections)


def test_an_sft_adapter_is_merged_and_a_reward_adapter_recognized(
    folder: Path, tiny_folder: str, sft_adapter: str, reward_adapter: str
) -> None:
    given = ["--base", tiny_folder, "--sft", sft_adapter, "--reward", reward_adapter, "--data", "prompts.jsonl"]
    assert main(["init", "run.yaml", *given]) == 0
    config = load_config("run.yaml")
    assert (config.reference.use, config.reference.options) == ("merged-base", {"adapter": sft_adapter})
    assert config.reward[0].use == "adapter"
    assert main(["check", "run.yaml", "--set", "sampling.max_new_tokens=16", "--set", "data.max_prompt_tokens=16"]) == 0


def test_without_a_terminal_it_never_asks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "run.yaml", "--base", "x"]) == 2
    assert "no terminal to ask on, and no answer for --reward, --data" in capsys.readouterr().err
    assert not Path("run.yaml").exists()


def test_on_a_terminal_it_asks_what_is_not_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    answers = iter(["", "rewards.py:score", "8bit", "prompts.jsonl"])

    def prompt(question: str, **options: Any) -> str:
        asked.append(question[:6])
        return next(answers)

    monkeypatch.setattr("marl_plugins.init.typer.prompt", prompt)
    monkeypatch.setattr("marl_plugins.init.sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    assert main(["init", "run.yaml", "--base", "owner/model"]) == 0
    assert asked == ["2 of 5", "3 of 5", "4 of 5", "5 of 5"]
    config = load_config("run.yaml")
    assert config.quantization.use == "bnb-8bit"
    assert config.reference.use == "disabled-adapter"


def test_an_empty_or_wrong_answer_is_asked_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["", "  ", "owner/model", "", "", "rewards.py:", "rewards.py:score", "16bit", "", "", "prompts.jsonl"]
    answers = iter(typed)
    monkeypatch.setattr("marl_plugins.init.typer.prompt", lambda question, **options: next(answers))
    monkeypatch.setattr("marl_plugins.init.sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    assert main(["init", "run.yaml"]) == 0
    assert list(answers) == []
    out = capsys.readouterr().out
    assert out.count("an answer is needed, e.g. HuggingFaceTB/SmolLM2-135M-Instruct") == 2
    assert "an answer is needed, e.g. rewards.py:score" in out
    assert "'rewards.py:' names no function" in out
    assert "'16bit' is none of full, 8bit, 4bit" in out
    assert main(["check", "run.yaml"]) == 0
    assert load_config("run.yaml").quantization.use == "none"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--base", " "], "--base: an answer is needed"),
        (["--reward", "rewards.py:a-b"], "--reward: 'rewards.py:a-b' names no function"),
        (["--data", ""], "--data: an answer is needed"),
        (["--field", ""], "--field: an answer is needed"),
    ],
)
def test_what_marl_would_not_take_is_not_written(
    folder: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "run.yaml", *OPTIONS, *options]) == 2
    assert said in capsys.readouterr().err
    assert not Path("run.yaml").exists()


def test_nothing_is_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("mine", encoding="utf-8")
    assert main(["init", "run.yaml", *OPTIONS]) == 2
    assert Path("run.yaml").read_text(encoding="utf-8") == "mine"
    assert main(["init", "run.yaml", *OPTIONS, "--force"]) == 0


def test_what_it_writes_fits_the_schema(folder: Path) -> None:
    from jsonschema import Draft202012Validator

    assert main(["init", "run.yaml", *OPTIONS, "--memory", "8bit"]) == 0
    written = parse_yaml(Path("run.yaml").read_text(encoding="utf-8"), "run.yaml")
    Draft202012Validator(json_schema(Catalog.installed())).validate(written)


PLACES = ("data.prompts", "data.field", "model.path", "observers", "run.folder", "run.checkpoint_every")
"""What a first config says for itself: the answers, where to write, who watches."""


def test_all_else_is_what_marl_does_without_a_config(folder: Path) -> None:
    """Every value, key by key, is the class's own default: the study's choice is made in one place."""
    assert main(["init", "run.yaml", *OPTIONS]) == 0
    written = parse_yaml((folder / "run.yaml").read_text(encoding="utf-8"), "run.yaml")
    plain = {"model": {"path": "x"}, "reference": "disabled-adapter", "reward": {"use": "function", "target": "x:y"}}
    usual = RunConfig.model_validate(plain)
    kept = usual.model_dump(by_alias=True) | {"value": {"on": Plan.of(usual).value_on}}
    for section in ("model", "policy", "value", "data", "sampling", "ppo", "run"):
        defaults = flatten(kept[section] or DataSection(prompts="x").model_dump(), section)
        for key, value in flatten(written[section], section).items():
            assert key in PLACES or defaults[key] == value, key
    assert load_config("run.yaml").data == DataSection(prompts="prompts.jsonl")
