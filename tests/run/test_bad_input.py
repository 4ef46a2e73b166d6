"""What bad input gets: one clear error of the right kind before the first step, and no run folder half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from marl_core import ConfigError, DataError, MarlError, PluginError, RunConfig, Runner
from marl_core.testing import write_tiny_model

MakeConfig = Callable[..., RunConfig]
Changes = Callable[["Inputs"], dict[str, Any]]


class Inputs:
    """Spoiled copies of the good files."""

    def __init__(self, folder: Path, model: str, sft: str, reward: str, rewards_file: str) -> None:
        self.folder, self.model, self.sft, self.reward, self.rewards_file = folder, model, sft, reward, rewards_file

    def function(self, name: str) -> dict[str, Any]:
        return {"reward": {"use": "function", "target": f"{self.rewards_file}:{name}"}}

    def code(self, text: str) -> dict[str, Any]:
        (self.folder / "mine.py").write_text(text, encoding="utf-8")
        return {"reward": {"use": "function", "target": f"{self.folder}/mine.py:score"}}

    def prompts(self, *prompts: Any, **options: Any) -> dict[str, Any]:
        file = self.folder / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
        return {"data": {"prompts": str(file), **options}}

    def reward_without(self, part: str) -> dict[str, Any]:
        folder = shutil.copytree(self.reward, self.folder / "reward")
        file = folder / "adapter_model.safetensors"
        save_file({key: tensor for key, tensor in load_file(file).items() if part not in key}, file)
        return {"reward": {"use": "adapter", "path": str(folder)}}

    def other_base(self) -> dict[str, Any]:
        return {
            "model": {"path": write_tiny_model(self.folder / "other", seed=7)},
            "reward": {"use": "adapter", "path": self.reward},
        }

    def other_width(self) -> dict[str, Any]:
        model = write_tiny_model(self.folder / "other", hidden_size=64)
        return {"model": {"path": model}, "reference": {"use": "merged-base", "adapter": self.sft}}

    def pickled_adapter(self) -> dict[str, Any]:
        folder = shutil.copytree(self.sft, self.folder / "sft")
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        return {
            "policy": {"start": "continue", "from": str(folder)},
            "reference": {"use": "peft-adapter", "adapter": str(folder)},
        }

    def truncated_model(self) -> dict[str, Any]:
        folder = shutil.copytree(self.model, self.folder / "model")
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        return {"model": {"path": str(folder)}}


FAILS: dict[str, tuple[type[MarlError], int, str, Changes]] = {
    "NaN reward": (
        PluginError,
        3,
        r"\.py:nan; function of .* response 1 got nan, not a finite number",
        lambda i: i.function("nan"),
    ),
    "one reward too few": (
        PluginError,
        3,
        r"\.py:one_too_few; function of .* gave 3 rewards for 4 responses",
        lambda i: i.function("one_too_few"),
    ),
    "reward raises": (
        PluginError,
        3,
        r"\.py:score; function of .* failed on a batch of 4: KeyError: 'x'\. It was raised from .*, line 1, in score",
        lambda i: i.code("def score(**columns): return columns['x']"),
    ),
    "reward's file fails": (
        PluginError,
        3,
        "could not be imported: ZeroDivisionError: division by zero. It was raised from .*, line 1",
        lambda i: i.code("score = 1 / 0"),
    ),
    "no such function": (
        ConfigError,
        2,
        "defines no 'score'; it defines scores",
        lambda i: i.code("def scores(**columns): return []"),
    ),
    "no such reward file": (
        ConfigError,
        2,
        "there is no file",
        lambda i: {"reward": {"use": "function", "target": "/nowhere/r.py:f"}},
    ),
    "reward adapter without head": (MarlError, 2, "holds no score weights", lambda i: i.reward_without("score")),
    "reward adapter without a layer": (
        DataError,
        4,
        "doesn't fit this base: 14 tensors are missing",
        lambda i: i.reward_without("layers.1."),
    ),
    "reward adapter of another base": (
        DataError,
        4,
        "other weights than this base|weights are not this base's",
        Inputs.other_base,
    ),
    "reward adapter missing": (
        DataError,
        4,
        "there is no adapter folder",
        lambda i: {"reward": {"use": "adapter", "path": str(i.folder / "none")}},
    ),
    "SFT adapter of another base": (DataError, 4, "doesn't fit this model", Inputs.other_width),
    "adapter as pickle": (DataError, 4, "is a pickle, which can run code", Inputs.pickled_adapter),
    "empty prompt": (DataError, 4, r"1 prompt of .* is empty \(row 2\)", lambda i: i.prompts("fine", "")),
    "over-long prompt": (DataError, 4, r"1 prompt of .* exceeds 250 tokens \(row 1\)", lambda i: i.prompts("a" * 251)),
    "prompt over the limit": (DataError, 4, "exceeds 3 tokens", lambda i: i.prompts("four", max_prompt_tokens=3)),
    "missing column": (DataError, 4, "no column 'text'", lambda i: i.prompts("a", field="text")),
    "prompts missing": (
        DataError,
        4,
        "there is no file",
        lambda i: {"data": {"prompts": str(i.folder / "none.jsonl")}},
    ),
    "held-out prompts missing": (
        DataError,
        4,
        "there is no file",
        lambda i: {"eval": {"prompts": str(i.folder / "none.jsonl")}},
    ),
    "model missing": (DataError, 4, "there is no folder", lambda i: {"model": {"path": str(i.folder / "none")}}),
    "model truncated": (DataError, 4, "not a whole safetensors file|could not be loaded", Inputs.truncated_model),
    "more tokens than positions": (
        ConfigError,
        2,
        "tokens leave no room for a prompt in the 256 positions",
        lambda i: {"sampling": {"max_new_tokens": 257}},
    ),
    "stop of several tokens": (
        ConfigError,
        2,
        "a stop must be a single token",
        lambda i: {"sampling": {"stop": ["ab"]}},
    ),
    "unknown LoRA target": (
        ConfigError,
        2,
        "no such layer in this model",
        lambda i: {"policy": {"targets": ["q_prj"]}},
    ),
    "unknown LoRA option": (
        ConfigError,
        2,
        "peft.s config of lora has no such option",
        lambda i: {"policy": {"lora": {"use_lora": True}}},
    ),
    "LoRA that rewrites the base": (
        ConfigError,
        2,
        "rewrites the base",
        lambda i: {"policy": {"lora": {"init_lora_weights": "pissa"}}},
    ),
}


@pytest.mark.parametrize("what", FAILS)
def test_one_clear_error_and_no_half_written_folder(
    make_config: MakeConfig,
    tiny_folder: str,
    sft_adapter: str,
    reward_adapter: str,
    rewards_file: str,
    tmp_path: Path,
    what: str,
) -> None:
    kind, code, message, changes = FAILS[what]
    (tmp_path / "inputs").mkdir()
    inputs = Inputs(tmp_path / "inputs", tiny_folder, sft_adapter, reward_adapter, rewards_file)
    folder = tmp_path / "runs" / "run"
    with pytest.raises(kind, match=message) as caught:
        Runner(
            make_config(run={"folder": str(folder), "checkpoint_every": 1}, ppo={"minibatch": 4}, **changes(inputs))
        ).train()
    assert caught.value.exit_code == code
    assert not folder.parent.exists()


def test_a_reward_that_turns_bad_later_leaves_the_last_checkpoint(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "calls = []\n\ndef score(completions, **columns):\n    calls.append(1)\n"
        "    return [float('nan') if len(calls) > 3 else 1.0] * len(completions)\n",
        encoding="utf-8",
    )
    folder = tmp_path / "run"  # the first call is the pre-flight check's
    reward = {"use": "function", "target": f"{tmp_path}/mine.py:score"}
    config = make_config(
        run={"folder": str(folder), "checkpoint_every": 1}, ppo={"steps": 5}, reward=reward, observers=["json-lines"]
    )
    with pytest.raises(PluginError, match="got nan"):
        Runner(config).train()
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-000001", "step-000002"]
    assert len((folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert Runner(config, resume=True).done == 2
