"""`~` in every key that may name a file: the run is the one of the spelled-out paths, and nothing called `~` is made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from marl_core import Catalog, Plan, Runner
from marl_core.config.load import parse_config
from marl_core.plan.describe import unseen
from marl_core.plan.memory import estimate
from marl_core.testing import tiny_tokenizer, write_tiny_model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with everything a run may read."""
    home = tmp_path_factory.mktemp("home")
    write_tiny_model(home / "base")
    tiny_tokenizer().save_pretrained(home / "words")
    for seed, (name, task) in enumerate((("sft", "CAUSAL_LM"), ("judge", "SEQ_CLS"))):
        torch.manual_seed(seed)
        reward = task == "SEQ_CLS"
        kind: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
        model = kind.from_pretrained(home / "base", **({"num_labels": 1} if reward else {}))
        model.config.pad_token_id = 0
        if reward:
            model.save_pretrained(home / "scorer")
            tiny_tokenizer().save_pretrained(home / "scorer")
        wrapped = get_peft_model(model, LoraConfig(task_type=task, r=2, init_lora_weights=False))
        wrapped.save_pretrained(str(home / name))
        tiny_tokenizer().save_pretrained(home / name) if reward else None
    rows = [{"prompt": f"a {i}"} for i in range(4)]
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "mine.py").write_text("def score(completions, **columns): return [float(len(c)) for c in completions]\n")
    return home


def config(home: str, **changes: Any) -> Any:
    written = {
        "model": {"path": f"{home}/base", "tokenizer": f"{home}/words", "dtype": "float32"},
        "policy": {"r": 2},
        "reference": "disabled-adapter",
        "reward": {"use": "function", "target": f"{home}/mine.py:score"},
        "data": {"prompts": f"{home}/prompts.jsonl", "max_prompt_tokens": 8},
        "sampling": {"max_new_tokens": 4},
        "ppo": {"steps": 1, "batch": 2, "minibatch": 2, "epochs": 1},
        "run": {"device": "cpu"},
    }
    return parse_config(written | changes, "test", Catalog.installed())


CHANGES: dict[str, Callable[[str], dict[str, Any]]] = {
    "model, tokenizer, prompts, function": lambda home: {},
    "policy.from, peft-adapter": lambda home: {
        "policy": {"start": "continue", "from": f"{home}/sft"},
        "reference": {"use": "peft-adapter", "adapter": f"{home}/sft"},
    },
    "merged-base": lambda home: {"reference": {"use": "merged-base", "adapter": f"{home}/sft"}},
    "reference model": lambda home: {
        "reference": {"use": "model", "path": f"{home}/base", "dtype": "float32"},
    },
    "reward adapter": lambda home: {"reward": {"use": "adapter", "path": f"{home}/judge"}},
    "reward model": lambda home: {"reward": {"use": "model", "path": f"{home}/scorer"}},
    "eval.prompts and a judge": lambda home: {
        "eval": {
            "prompts": f"{home}/prompts.jsonl",
            "judges": {"own": {"use": "function", "target": f"{home}/mine.py:score"}},
        },
    },
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_tilde_is_the_home(name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    found = []
    for start in ("~", str(home)):
        plan = Plan.of(config(start, **CHANGES[name](start)), Catalog.installed())
        assert plan.check() == []
        assert unseen(plan) is None
        memory = estimate(plan)
        result = Runner(plan).train()
        policy = (
            {key: value for key, value in result.last.metrics.items() if not key.startswith("perf/")}
            if result.last
            else {}
        )
        found.append((memory.peak, [role.shared for role in memory.roles], policy, result.after))
    assert found[0] == found[1]
    assert "~" not in os.listdir(tmp_path)


def test_the_run_folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = config(str(home), run={"device": "cpu", "folder": "~/runs/first"}, observers=["json-lines"])
    Runner(run).train()
    assert {"steps.jsonl", "final"} <= set(os.listdir(tmp_path / "runs" / "first"))
    assert "~" not in os.listdir(tmp_path)
    assert Runner(run, resume=True).done == 1


def test_what_is_saved_names_a_base_that_others_find(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft and transformers take no `~`: the adapter is loaded by them as it was written."""
    monkeypatch.setenv("HOME", str(home))
    runner = Runner(config("~"))
    runner.bank.save("policy", tmp_path / "policy")
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy")
