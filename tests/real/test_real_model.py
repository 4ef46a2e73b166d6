"""What a tiny model can't show, on SmolLM2-135M and movie reviews: bitwise references, rewards, frozen weights, each strategy."""

from __future__ import annotations

import copy
import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from marl_core import AdapterBank, ConfigError, RunConfig, Runner
from marl_core.bank.merge import merge_adapter
from marl_core.ppo.types import pad_rows

pytestmark = pytest.mark.real
MakeConfig = Callable[..., RunConfig]
Write = Callable[..., str]
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


def quickstart(name: str) -> ModuleType:
    """A module of the quickstart, loaded by its path."""
    sys.path.insert(0, str(QUICKSTART))  # its modules import each other by plain names
    try:
        spec = importlib.util.spec_from_file_location(f"quickstart_{name}", QUICKSTART / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(QUICKSTART))


@pytest.fixture(scope="session")
def real_model() -> str:
    """Folder of SmolLM2-135M-Instruct, fetched once into the quickstart's cache."""
    folder: str = quickstart("fetch").fetch_model()
    return folder


@pytest.fixture(scope="session")
def snippets() -> list[str]:
    """A hundred real review snippets."""
    reviews = quickstart("data").read_reviews(quickstart("fetch").fetch_text())
    return [review.text for review in reviews[:: len(reviews) // 100][:100]]


@pytest.fixture(scope="session")
def sft(real_model: str, write_sft_adapter: Write, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An SFT adapter with weights about as large as a short training leaves them."""
    return write_sft_adapter(
        real_model, tmp_path_factory.mktemp("real") / "sft", scale=0.02, target_modules=["q_proj", "v_proj"]
    )


@pytest.fixture(scope="session")
def reward(real_model: str, write_reward_adapter: Write, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward adapter in the format of TRL's RewardTrainer."""
    folder = tmp_path_factory.mktemp("real") / "reward"
    return write_reward_adapter(real_model, folder, scale=0.02, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="session")
def small(make_config: MakeConfig, real_model: str) -> MakeConfig:
    """One step of two prompts and six tokens."""

    def make(**changes: Any) -> RunConfig:
        model = {"path": real_model, "dtype": "float32", **changes.pop("model", {})}
        ppo = {"steps": 1, "batch": 2, "minibatch": 2, "epochs": 2, "learning_rate": 1e-3, **changes.pop("ppo", {})}
        policy = {"targets": ["q_proj", "v_proj"], **changes.pop("policy", {})}
        return make_config(model=model, ppo=ppo, policy=policy, **{"sampling": {"max_new_tokens": 6}, **changes})

    return make


def test_the_tokenizer_begins_and_ends_texts_as_the_model_does(real_model: str) -> None:
    """Made from the GGUF file by transformers, whose 5.17 mixes them up."""
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(real_model), AutoTokenizer.from_pretrained(real_model)
    for role in ("bos", "eos", "pad"):
        assert getattr(tokenizer, f"{role}_token_id") == getattr(config, f"{role}_token_id"), role
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


LINES = ["a new LoRA on the base", "a new LoRA on the merged base", "a copy of the SFT adapter"]


def line(name: str, sft: str) -> dict[str, Any]:
    """The right lines of design section 7."""
    lines: dict[str, dict[str, Any]] = {
        LINES[0]: {"reference": "disabled-adapter"},
        LINES[1]: {"reference": {"use": "merged-base", "adapter": sft}},
        LINES[2]: {"reference": {"use": "peft-adapter", "adapter": sft}, "policy": {"start": "continue", "from": sft}},
    }
    return lines[name]


class TestReference:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("name", LINES)
    def test_step_0_kl_is_bitwise_zero(self, small: MakeConfig, sft: str, name: str, dtype: str) -> None:
        runner = Runner(small(model={"dtype": dtype}, speed={"capture": False}, **line(name, sft)))
        assert runner.data is not None
        checks = {check.name: check for check in runner.check_start(runner.data.take([0, 1])).checks}
        assert checks["reference"].numbers["max_difference"] == 0.0
        assert checks["ratio"].numbers["max_error"] == 0.0
        scored = runner.score(runner.generate(runner.data.take([2, 3])))
        assert scored.ref_logprobs is not None
        assert torch.equal(scored.logprobs, scored.ref_logprobs)

    def test_captured_log_probs_are_the_reference_s_to_rounding(self, small: MakeConfig) -> None:
        """I24 on the real model, where the reference is another pass than sampling: 1e-4."""
        runner = Runner(small(model={"dtype": "float32"}, reference="disabled-adapter"))
        assert runner.data is not None
        rollout = runner.generate(runner.data.take([0, 1, 2, 3]))
        scored = runner.score(rollout)
        assert rollout.behavior is not None
        assert scored.ref_logprobs is not None
        torch.testing.assert_close(scored.logprobs, scored.ref_logprobs, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_classic_trap_is_refused_and_measured(self, small: MakeConfig, sft: str, dtype: str) -> None:
        policy = {"start": "continue", "from": sft}
        with pytest.raises(ConfigError, match="the reference never saw that adapter's training"):
            Runner(small(model={"dtype": dtype}, policy=policy))
        runner = Runner(
            small(model={"dtype": dtype}, policy=policy, reference={"use": "disabled-adapter", "allow_mismatch": True})
        )
        assert runner.data is not None
        found = next(
            check for check in runner.check_start(runner.data.take([0, 1])).checks if check.name == "reference"
        )
        assert not found.ok
        assert found.numbers["mean_difference"] > 0.01


class TestReward:
    """A hundred snippets: the adapter on the shared base against transformers' classifier with peft.

    The right value is the classifier's in float64, told the positions, which it would count from the padding otherwise. In float32
    marl's scores, of rows at the left edge or packed, are as near to it as the classifier's own: 2.2e-6 to 3.7e-6 measured for all
    three, over scores that spread by about one.
    """

    @pytest.mark.parametrize("pad_is_eos", [False, True], ids=["pad", "pad-is-eos"])
    @pytest.mark.parametrize("append_eos", [False, True], ids=["no-eos", "eos"])
    def test_i17_equals_the_classifier(
        self, real_model: str, reward: str, snippets: list[str], tmp_path: Path, pad_is_eos: bool, append_eos: bool
    ) -> None:
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        words = AutoTokenizer.from_pretrained(real_model)
        words.pad_token = words.eos_token if pad_is_eos else words.unk_token
        adapter = shutil.copytree(reward, tmp_path / "reward")
        words.save_pretrained(adapter)
        bank = AdapterBank.from_pretrained(real_model, device="cpu")
        bank.trunk.options = replace(bank.trunk.options, pack=False)
        bank.load_reward(adapter)
        packing = AdapterBank.from_pretrained(real_model, device="cpu")
        packing.load_reward(adapter)
        model = AutoModelForSequenceClassification.from_pretrained(real_model, num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = words.pad_token_id
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
        exact = copy.deepcopy(model).double()
        rows = sorted((words(text).input_ids[:32] + [words.eos_token_id] * append_eos for text in snippets), key=len)
        spread, off = [], []
        for start, side in ((0, "left"), (50, "right"), (25, "left"), (75, "right")):
            ids, mask = pad_rows(rows[start : start + 25], words.pad_token_id, side)
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
            with torch.no_grad():
                expected = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions).logits.squeeze(-1)
                right = exact(input_ids=ids, attention_mask=mask.long(), position_ids=positions).logits.squeeze(-1)
            found = (bank.compute_reward_score(ids, mask), packing.compute_reward_score(ids, mask), expected)
            off.append([float((scores.double() - right).abs().max()) for scores in found])
            spread.append(expected)
        padded, packed, theirs = (max(column) for column in zip(*off, strict=True))
        print(f"from float64: padded {padded:.2g}, packed {packed:.2g}, transformers' classifier {theirs:.2g}")
        assert max(padded, packed, theirs) < 3e-5
        assert max(padded, packed) < 3 * theirs
        assert float(torch.cat(spread).std()) > 0.1


class TestFrozen:
    @pytest.mark.parametrize("quantization", ["none", "bnb-8bit", "bnb-4bit"])
    def test_weights_are_bitwise_unchanged_after_training(
        self, small: MakeConfig, reward: str, quantization: str, base_state: Callable[[Any], dict[str, Tensor]]
    ) -> None:
        config = small(
            model={"dtype": "bfloat16"}, quantization=quantization, reward={"use": "adapter", "path": reward}
        )
        runner = Runner(config)
        before = base_state(runner.bank)
        judge = {name: tensor.clone() for name, tensor in runner.bank.tensors("reward").items()}
        policy = {name: tensor.clone() for name, tensor in runner.bank.tensors("policy").items()}
        (stats,) = runner.steps()
        after = base_state(runner.bank)
        assert [name for name in before if not torch.equal(after[name], before[name])] == []
        assert all(torch.equal(tensor, judge[name]) for name, tensor in runner.bank.tensors("reward").items())
        assert any(not torch.equal(tensor, policy[name]) for name, tensor in runner.bank.tensors("policy").items())
        assert stats["objective/kl"] == 0.0
        assert stats["policy/first_ratio_error"] == 0.0


class TestEachStrategyOnce:
    """References and quantizations are shown above; here rewards, value functions and advantages."""

    @pytest.fixture(scope="class")
    @classmethod
    def judge(cls, real_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        folder = tmp_path_factory.mktemp("judge")
        model = AutoModelForSequenceClassification.from_pretrained(real_model, num_labels=1, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(real_model).save_pretrained(folder)
        return str(folder)

    def test_model_reward_with_a_value_of_its_own(self, small: MakeConfig, judge: str) -> None:
        reward = {"use": "model", "path": judge, "dtype": "bfloat16"}
        value = {"on": "own", "r": 4, "targets": ["q_proj"]}
        (stats,) = Runner(small(model={"dtype": "bfloat16"}, reward=reward, value=value)).steps()
        assert stats["val/grad_norm"] > 0

    @pytest.mark.parametrize("advantage", ["rloo", "grpo"])
    def test_function_reward_without_a_value_function(
        self, small: MakeConfig, advantage: str, rewards_file: str
    ) -> None:
        reward = [
            {"use": "function", "target": f"{rewards_file}:letters"},
            {"use": "function", "target": f"{rewards_file}:labels", "weight": 0.1},
        ]
        ppo = {"advantage": advantage, "samples_per_prompt": 2, "batch": 4}
        (stats,) = Runner(small(model={"dtype": "bfloat16"}, reward=reward, ppo=ppo, value="none")).steps()
        assert stats["policy/grad_norm"] > 0

    def test_merged_base_with_a_reward_adapter_trained_on_it(
        self, small: MakeConfig, real_model: str, sft: str, write_reward_adapter: Write, tmp_path: Path
    ) -> None:
        """The quickstart's own set-up, 4-bit: merge in full precision, quantize, reward of the merged weights."""
        merged = str(merge_adapter(real_model, sft, tmp_path / "merged").out)
        reward = {
            "use": "adapter",
            "path": write_reward_adapter(merged, tmp_path / "reward", scale=0.02, target_modules=["q_proj"]),
        }
        reference = {"use": "merged-base", "adapter": sft}
        runner = Runner(small(quantization={"use": "bnb-4bit", "double": True}, reference=reference, reward=reward))
        (stats,) = runner.steps()
        assert stats["objective/kl"] == 0.0
        assert "trained on these weights" in runner.bank.reward_checks["reward"]
