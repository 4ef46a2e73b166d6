"""docs/from-trl.md is true: its loop runs, its commands write what it says, TRL's own reward functions work unchanged."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from marl_core import Catalog, Runner, StepStats
from marl_core.cli.app import main
from marl_core.config.load import load_config, parse_config
from marl_core.config.yaml_text import parse_yaml
from marl_core.ppo.types import UpdateStats
from marl_core.registry.strategy import Strategy
from marl_core.testing import fake_rollout, tiny_bank, write_tiny_model
from marl_plugins.migrate import llamafactory
from marl_plugins.reward import FunctionReward

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "from-trl.md").read_text(encoding="utf-8")
BATCHES = [["A good", "It was", "The cast", "Bad"], ["I never", "What a film", "So", "Well"]]


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_classic_loop_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_reward_adapter: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_model("my-model")
    write_reward_adapter("my-model", Path("my-reward-adapter"))
    names: dict[str, Any] = {"batches": BATCHES}
    loop, parts = blocks("python")
    exec(compile(loop, "docs/from-trl.md", "exec"), names)
    runner = names["runner"]
    assert isinstance(runner, Runner)
    assert isinstance(names["stats"], StepStats)
    assert runner.done == 2
    assert runner.bank.active == "policy"
    assert len(capsys.readouterr().out.splitlines()) == 2
    again = runner.score(names["rollout"])  # "the configured reward gives the same"
    torch.testing.assert_close(again.scores, names["rewards"], rtol=1e-5, atol=1e-5)
    exec(compile(parts, "docs/from-trl.md", "exec"), names)
    assert names["stats"].step == 3
    assert isinstance(names["update"], UpdateStats)


def test_its_commands_write_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ppo.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    steps = []
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            assert words[0] == "marl"
            assert main([*words[1:], "--force"]) == 0
            steps.append(load_config("run.yaml").ppo.steps)
    assert steps == [625, 100, 100]


def test_its_llama_factory_example_becomes_what_it_says() -> None:
    theirs, ours = (parse_yaml(text, "docs/from-trl.md") for text in blocks("yaml"))
    found = llamafactory.migrate(theirs)
    catalog = Catalog.installed()
    assert parse_config(found.config, "carried", catalog) == parse_config(ours, "docs/from-trl.md", catalog)
    assert {key for key, _ in found.refused} == {"cutoff_len", "do_train", "template", "dataset"}
    assert {key for key, _ in found.assumed} == {
        "lora_alpha",
        "ppo_epochs",
        "max_grad_norm",
        "ppo_target",
        "seed",
        "reward_model_type",
        "disable_gradient_checkpointing",
        "number of processes",
    }


def test_the_options_in_its_table_exist() -> None:
    """Each Python cell of the first table that sets sections makes a RunConfig."""
    base: dict[str, Any] = {
        "model": {"path": "m"},
        "reference": "disabled-adapter",
        "reward": {"use": "function", "target": "m:f"},
    }
    found = 0
    for cell in re.findall(r"`((?:ppo|shaping|quantization|observers)=[^`]+)`", PAGE):
        parse_config({**base, **eval(f"dict({cell})")}, "docs/from-trl.md", Catalog.installed())
        found += 1
    assert found == 6


@pytest.mark.parametrize(
    "name", ["think_format_reward", "get_repetition_penalty_reward", "get_soft_overlong_punishment"]
)
def test_trls_own_reward_functions_work_unchanged(name: str, tmp_path: Path) -> None:
    """Plain ones by import string, those that a factory makes through a file of two lines, as one would write it for GRPOTrainer."""
    import trl.rewards

    chat = [[{"role": "user", "content": "Think."}]] * 3
    words = ["<think>\nhm\n</think>\nyes", "no no no no", "yes"]
    rollout = chat_rollout(chat, words)
    if name.startswith("get_"):
        arguments = {
            "get_repetition_penalty_reward": "ngram_size=2, max_penalty=-1.0",
            "get_soft_overlong_punishment": "10, 5",
        }[name]
        file = tmp_path / "mine.py"
        file.write_text(f"from trl.rewards import {name}\nscore = {name}({arguments})\n", encoding="utf-8")
        target = f"{file}:score"
    else:
        target = f"trl.rewards:{name}"
    strategy: Strategy = FunctionReward(target=target)
    plan: Any = SimpleNamespace(judges={}, data_columns={"data.prompts": frozenset({"prompt", "solution"})})
    assert not list(FunctionReward.marl_check(strategy, plan))  # type: ignore[arg-type]  # a FunctionReward
    bank = tiny_bank()
    found = FunctionReward(target=target).marl_reward(bank.tokenizer)(rollout)
    completions = [[{"role": "assistant", "content": text}] for text in rollout.texts]
    ids = [row[keep].tolist() for row, keep in zip(rollout.ids, rollout.mask, strict=True)]
    function = getattr(trl.rewards, name)
    if name.startswith("get_"):
        function = eval(f"function({arguments})", {"function": function})
    assert found == function(prompts=chat, completions=completions, completion_ids=ids)
    assert len(set(found)) > 1  # they tell these responses apart


def chat_rollout(chat: list[Any], words: list[str]) -> Any:
    from dataclasses import replace

    rollout = fake_rollout([("Think.", word) for word in words])
    return replace(rollout, prompts=replace(rollout.prompts, texts=chat))
