"""load_config: every problem on a line of its own with path, value and what is allowed; dump_config is its inverse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from marl_core import Catalog, ConfigError, PluginError, RunConfig, dump_config, load_config
from marl_core.config.load import parse_config
from marl_core.config.run_config import ClipSection


def test_file_environment_set_weakest_first(config_file: Path, catalog: Catalog) -> None:
    env = {"MARL__PPO__KL__COEF": "0.3", "MARL__PPO__BATCH": "16"}
    config = load_config(
        config_file, ["ppo.kl.coef=1e-3", "ppo.clip=0.1"], catalog, env, defaults={"observers": ["quiet"]}
    )
    assert config.ppo.kl.coef == 1e-3
    assert config.ppo.batch == 16
    assert config.ppo.clip == ClipSection(low=0.1, high=0.1)
    assert [choice.use for choice in config.observers] == ["quiet"]
    assert config.reward[0].options == {"target": 8}


def test_a_config_built_in_python_reads_no_environment(
    monkeypatch: pytest.MonkeyPatch, written: dict[str, Any]
) -> None:
    monkeypatch.setenv("MARL__PPO__BATCH", "64")
    assert RunConfig.model_validate(written).ppo.batch == 32


def test_dump_loads_back_to_an_equal_config(config_file: Path, catalog: Catalog, tmp_path: Path) -> None:
    sets = [
        "policy={start: continue, from: x}",
        "value=own",
        "ppo.max_grad_norm=null",
        "model.path='1e-4'",
        "reward.0.name=on",
    ]
    config = load_config(config_file, sets, catalog, {})
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again, (), catalog, {}) == config
    assert load_config(again, ["reward.0.target=9"], catalog, {}) != config


LLAMAFACTORY = """model_name_or_path: meta-llama/Llama-3-8B
reward_model: saves/reward
stage: ppo
finetuning_type: lora
lora_target: all
dataset: identity
template: llama3
learning_rate: 1.0e-5
"""
TRL = "model_name_or_path: EleutherAI/pythia-1b\nreward_model_path: x\nkl_coef: 0.05\nnum_ppo_epochs: 4\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            LLAMAFACTORY,
            "a config of LLaMA-Factory, .*Convert it: marl import llamafactory .*ppo.yaml --to marl.yaml",
        ),
        (TRL, "a config of a TRL script, .*Convert it: marl import trl-args --config .*ppo.yaml --to marl.yaml"),
    ],
)
def test_a_config_of_another_trainer_is_told_by_its_keys(
    tmp_path: Path, catalog: Catalog, text: str, said: str
) -> None:
    file = tmp_path / "ppo.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(file, (), catalog, {})
    assert "\n" not in str(caught.value)


def test_a_slip_of_the_pen_is_no_other_trainer(config_file: Path, catalog: Catalog) -> None:
    config_file.write_text(
        config_file.read_text(encoding="utf-8") + "\nlearning_rate: 1\nkl_coef: 2\n", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=r"learning_rate: unknown key\. It belongs in"):
        load_config(config_file, (), catalog, {})


@pytest.mark.parametrize(
    ("sets", "line"),
    [
        (["ppo.batch=0"], "ppo.batch: should be greater than 0, but 0 was given. (given by sets['ppo.batch=0'])"),
        (["ppo.batch='3'"], "ppo.batch: should be a valid integer, but '3' was given."),
        (["ppo.batch=true"], "ppo.batch: should be a valid integer, but True was given."),
        (["ppo.batch=3.5"], "ppo.batch: should be a valid integer"),
        (["ppo.learning_rate=.nan"], "ppo.learning_rate: should be a finite number, but nan was given."),
        (["ppo.gamma=1.5"], "ppo.gamma: should be less than or equal to 1, but 1.5 was given."),
        (["ppo.advantage=gea"], "ppo.advantage: no advantage strategy is called 'gea'; did you mean 'gae'?"),
        (["ppo.batc=4"], "ppo.batc: unknown key. Did you mean 'batch'?"),
        (["ppo.learning-rate=4"], "ppo.learning-rate: unknown key. Did you mean 'learning_rate'?"),
        (["ppo.kl.coeff=4"], "ppo.kl.coeff: unknown key. Did you mean 'coef'?"),
        (["reward.traget=4"], "reward.traget: unknown key. Did you mean 'target'?"),
        (["reward=[{use: short, wieght: 2}]"], "reward.0.wieght: unknown key. Did you mean 'weight'?"),
        (["temperature=4"], "temperature: unknown key. It belongs in sampling."),
        (["reward.target=0"], "reward.target: should be greater than 0, but 0 was given."),
        (
            ["reward.use=shrot"],
            "reward: no reward strategy is called 'shrot'; did you mean 'short'? Installed: broken, short.",
        ),
        (["reference=short"], "reference: no reference strategy is called 'short'; 'short' is a reward strategy."),
        (["reference=merged"], "reference.adapter: is required and wasn't given."),
        (["reference=3"], "reference: give a strategy's name, or {use: name, option: value}; this is 3."),
        (["reference.use=3"], "reference.use: should be a valid string, but 3 was given."),
        (["reference.options=3"], "reference.options: should be a valid dictionary, but 3 was given."),
        (["model=3"], "model: should be a section (a mapping with keys), but 3 was given."),
        (["model={}"], "model.path: is required and wasn't given."),
        (["policy.targets=3"], "policy.targets: should be a valid string or should be a valid list, but 3 was given."),
        (["ppo.minibatch=5"], "ppo: minibatch 5 does not divide batch 32 (remainder 2)."),
        (["quantization=nine"], "quantization: no quantization strategy is called 'nine'; did you mean 'none'?"),
        (["eval.judges.j.use=shrot"], "eval.judges.j: no reward strategy is called 'shrot'"),
    ],
)
def test_problem_lines(config_file: Path, catalog: Catalog, sets: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)) as caught:
        load_config(config_file, sets, catalog, {})
    assert str(caught.value).startswith(f"{config_file}: 1 problem in the config:\n  ")


def test_all_problems_come_at_once_and_name_the_environment(config_file: Path, catalog: Catalog) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, ["reward.target=0"], catalog, {"MARL__RUN__SEED": "-1"})
    assert "2 problems" in str(caught.value)
    assert "(given by environment variable MARL__RUN__SEED)" in str(caught.value)


BAD = """\
model: {path: owner/model}
reference: bare
reward:
  - use: short
    target: 8
    wieght: 2
  - {use: shrot}
value:
  on: none
ppo:
  batch: 4
  kl: {
    coef: high}
  minibatch: 8
observers: [quiet,
  7]
"""


SHORT = "model: {path: x}\nreference: bare\nreward: short\n"


@pytest.mark.parametrize(
    ("text", "sets", "lines"),
    [
        (BAD, [], [":6: reward.0.wieght: ", ":7: reward.1: ", ":13: ppo.kl.coef: ", ":16: observers.1: "]),
        (BAD.replace("high", "1"), ["reward=short", "observers=[]"], [":10: ppo: minibatch 8 does not divide"]),
        (
            SHORT + "sampling:\n  max_new_tokens: 2\n  min_new_tokens: 3",
            [],
            [":4: sampling: min_new_tokens 3 is above"],
        ),
        (SHORT.replace("path: x", ""), [], [":1: model.path: is required"]),
        (SHORT + "policy: &a {start: 3}\neval: *a", [], [":4: policy.start: should be", ":4: eval.start: unknown key"]),
    ],
)
def test_a_problem_names_its_line(
    config_file: Path, catalog: Catalog, text: str, sets: list[str], lines: list[str]
) -> None:
    config_file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, sets, catalog, {})
    _, *found = str(caught.value).splitlines()
    for line, start in zip(found, lines, strict=True):
        assert line.startswith(f"  {config_file}{start}")


@pytest.mark.parametrize("sets", [["ppo.minibatch=5"], ["ppo.minibatch=5", "ppo.batch=8"], ["reward.target=0"]])
def test_what_was_set_is_no_line_of_the_file(config_file: Path, catalog: Catalog, sets: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, sets, catalog, {})
    assert str(caught.value).count(f"{config_file}:") == 1


def test_a_broken_plugin_is_a_plugin_error(config_file: Path, catalog: Catalog) -> None:
    with pytest.raises(PluginError, match=r"broken of broken-marl 0\.1 .* could not be imported"):
        load_config(config_file, ["reward=broken"], catalog, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the config is empty"),
        (b"null", "the config is empty"),
        (b"- a", "the config is a list"),
        (b"text", "the config is a str"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b"a: 1\n" * 300_000, "larger than"),
        (b"a: [", "line 1"),
    ],
)
def test_unreadable_files(tmp_path: Path, catalog: Catalog, content: bytes, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(file, (), catalog, {})


def test_missing_files(tmp_path: Path, catalog: Catalog) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("missing.yaml", ".", "dangling", "a\0b", "x" * 5000):
        with pytest.raises(ConfigError, match="can't read the config"):
            load_config(tmp_path / name, (), catalog, {})


def test_deep_nesting_is_refused(written: dict[str, Any], catalog: Catalog) -> None:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ConfigError):
        parse_config({**written, "policy": {"lora": {"x": deep}}, "model": 3}, "f", catalog)
