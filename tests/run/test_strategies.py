"""Every built-in strategy with every other: by config and as Python objects, with the same result, on a frozen base."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from marl_core import RunConfig, Runner, Strategy
from marl_core.bank.merge import merge_adapter
from marl_core.testing import fake_rollout
from marl_plugins.quantization import Bnb4Bit, Bnb8Bit, NoQuantization
from marl_plugins.reference import DisabledAdapter, MergedBase, PeftAdapter
from marl_plugins.reward import AdapterReward, FunctionReward, ModelReward
from marl_plugins.reward_model import RewardModel

MakeConfig = Callable[..., RunConfig]
Write = Callable[..., str]

REFERENCES = ("disabled-adapter", "merged-base", "peft-adapter")
REWARDS = ("adapter", "model", "function")
LEARNING = ("gae, value on policy", "gae, value of its own", "rloo", "grpo")
QUANTIZATIONS = ("none", "bnb-8bit", "nf4", "fp4", "double")
# Every pair of choices occurs: (q + l, q + 2l) mod 3 runs through all pairs as q and l do.
CASES = [
    (REFERENCES[(q + v) % 3], REWARDS[(q + 2 * v) % 3], LEARNING[v], QUANTIZATIONS[q])
    for q, v in product(range(5), range(4))
]


def test_the_cases_cover_every_pair() -> None:
    families = (REFERENCES, REWARDS, LEARNING, QUANTIZATIONS)
    for one, other in combinations(range(4), 2):
        assert {(case[one], case[other]) for case in CASES} == set(product(families[one], families[other]))


@dataclass(frozen=True)
class Material:
    """Folders of the base, and of what was trained on it."""

    base: str
    sft: str
    reward: str
    reward_on_merged: str
    judge: str


@pytest.fixture(scope="module")
def material(
    wide_folder: str, tmp_path_factory: pytest.TempPathFactory, write_sft_adapter: Write, write_reward_adapter: Write
) -> Material:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("material")
    base = wide_folder
    sft = write_sft_adapter(base, folder / "sft")
    merged = str(merge_adapter(base, sft, folder / "merged").out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    judge.save_pretrained(folder / "judge")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "judge")
    return Material(
        base,
        sft,
        write_reward_adapter(base, folder / "reward"),
        write_reward_adapter(merged, folder / "reward-on-merged"),
        str(folder / "judge"),
    )


def choices(
    case: tuple[str, str, str, str], m: Material, rewards_file: str
) -> tuple[dict[str, Any], dict[str, Strategy]]:
    """The case's strategies as a config names them, and as Python makes them."""
    reference, reward, _, quantization = case
    path = m.reward_on_merged if reference == "merged-base" else m.reward
    target = f"{rewards_file}:odd"
    named: dict[str, dict[str, Any]] = {
        "disabled-adapter": {"use": "disabled-adapter"},
        "merged-base": {"use": "merged-base", "adapter": m.sft},
        "peft-adapter": {"use": "peft-adapter", "adapter": m.sft},
        "adapter": {"use": "adapter", "path": path},
        "model": {"use": "model", "path": m.judge},
        "function": {"use": "function", "target": target},
        "none": {"use": "none"},
        "bnb-8bit": {"use": "bnb-8bit"},
        "nf4": {"use": "bnb-4bit"},
        "fp4": {"use": "bnb-4bit", "type": "fp4"},
        "double": {"use": "bnb-4bit", "double": True},
    }
    made: dict[str, Callable[[], Strategy]] = {
        "disabled-adapter": DisabledAdapter,
        "merged-base": lambda: MergedBase(adapter=m.sft),
        "peft-adapter": lambda: PeftAdapter(adapter=m.sft),
        "adapter": lambda: AdapterReward(path=path),
        "model": lambda: ModelReward(path=m.judge),
        "function": lambda: FunctionReward(target=target),
        "none": NoQuantization,
        "bnb-8bit": Bnb8Bit,
        "nf4": Bnb4Bit,
        "fp4": lambda: Bnb4Bit(type="fp4"),
        "double": lambda: Bnb4Bit(double=True),
    }
    keys = {"reference": reference, "reward": reward, "quantization": quantization}
    return {key: named[name] for key, name in keys.items()}, {key: made[name]() for key, name in keys.items()}


def learning(case: tuple[str, str, str, str]) -> dict[str, Any]:
    critic_free = case[2] in ("rloo", "grpo")
    ppo: dict[str, Any] = {"advantage": case[2], "samples_per_prompt": 2} if critic_free else {"advantage": "gae"}
    value = {"on": "own", "r": 2} if case[2] == LEARNING[1] else {"on": "none" if critic_free else "policy"}
    return {"ppo": ppo, "value": value}


def run(config: RunConfig, base_state: Callable[[Any], dict[str, Tensor]]) -> tuple[Runner, list[dict[str, float]]]:
    """Two steps; frozen is frozen."""
    runner = Runner(config)
    bank = runner.bank
    frozen = {name: bank.tensors(name) for name in bank.adapters if name not in bank.trainable}
    before = {name: {key: t.clone() for key, t in tensors.items()} for name, tensors in frozen.items()}
    heads = {name: head.weight.detach().clone() for name, head in bank.heads.items()}
    base = base_state(bank)
    steps = [
        {name: value for name, value in stats.metrics.items() if not name.startswith("perf/")}
        for stats in runner.steps()
    ]
    after = base_state(bank)
    assert after.keys() == base.keys()
    assert [name for name in base if not torch.equal(after[name], base[name])] == []
    assert all(torch.equal(t, before[name][key]) for name in frozen for key, t in bank.tensors(name).items())
    assert all(torch.equal(head.weight, heads[name]) == name.endswith("-score") for name, head in bank.heads.items())
    return runner, steps


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_by_config_and_by_python(
    case: tuple[str, str, str, str], material: Material, make_config: MakeConfig, rewards_file: str, base_state: Any
) -> None:
    by_name, by_object = choices(case, material, rewards_file)
    policy = (
        {"start": "continue", "from": material.sft} if case[0] == "peft-adapter" else {"targets": ["q_proj", "v_proj"]}
    )
    config = make_config(model={"path": material.base}, policy=policy, **by_name, **learning(case))
    runner, steps = run(config, base_state)
    assert len(steps) == 2
    assert runner.preflight is not None
    assert "step-0 KL is bitwise 0" in next(
        check.detail for check in runner.preflight.checks if check.name == "reference"
    )
    captured = case[3] == "none"  # float32: the old log-probs come from the sampling pass (I24), else bitwise (I1, I2)
    assert abs(steps[0]["objective/kl"]) <= (1e-4 if captured else 0.0)
    assert steps[0]["policy/first_ratio_error"] <= (1e-4 if captured else 0.0)
    assert steps[0]["policy/grad_norm"] > 0
    quantized = sum(name.endswith((".absmax", ".SCB")) for name in base_state(runner.bank))
    assert quantized == (0 if case[3] == "none" else 14)

    written = config.model_dump(by_alias=True)
    objects = RunConfig.model_validate({**written, **by_object, "reward": [by_object["reward"]]})
    _, again = run(objects, base_state)
    assert again == steps  # the sources' names in the metrics, too


class TestWeightedList:
    def test_each_source_is_logged_and_weighted(
        self, make_config: MakeConfig, material: Material, rewards_file: str
    ) -> None:
        rewards = [
            {"use": "function", "target": f"{rewards_file}:odd", "weight": 2.0, "name": "odd"},
            {"use": "function", "target": f"{rewards_file}:labels", "weight": -0.5, "name": "labels"},
            {"use": "adapter", "path": material.reward, "weight": 0.1},
        ]
        stats = next(Runner(make_config(model={"path": material.base}, reward=rewards)).steps())
        total = 2.0 * stats["reward/odd"] - 0.5 * stats["reward/labels"] + 0.1 * stats["reward/adapter"]
        assert stats["objective/scores"] == pytest.approx(total, abs=1e-5)
        assert stats["reward/labels"] != 0

    def test_two_of_one_name_are_numbered(self, make_config: MakeConfig, rewards_file: str) -> None:
        source = {"use": "function", "target": f"{rewards_file}:odd"}
        stats = next(Runner(make_config(reward=[source, source])).steps())
        assert {name for name in stats.metrics if name.startswith("reward/")} == {
            "reward/function-1",
            "reward/function-2",
        }


class TestFunctionReward:
    def score(self, target: str, make_config: MakeConfig, **options: Any) -> list[float]:
        runner = Runner(make_config(reward={"use": "function", "target": target, **options}))
        assert runner.data is not None
        found: list[float] = runner.score(runner.generate(runner.data.take([0, 1, 2, 3]))).scores.tolist()
        return found

    def test_async_with_a_column(self, make_config: MakeConfig, rewards_file: str) -> None:
        assert self.score(f"{rewards_file}:labels", make_config) == [0.0, 1.0, 2.0, 3.0]

    def test_a_package_and_arguments(
        self, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "acme_rewards.py").write_text(
            "def constant(completions, value): return [value] * len(completions)\n", encoding="utf-8"
        )
        monkeypatch.syspath_prepend(tmp_path)
        assert self.score("acme_rewards:constant", make_config, arguments={"value": 1.5}) == [1.5] * 4


class TestModelReward:
    def test_is_the_classifier_on_the_decoded_text(self, make_config: MakeConfig, material: Material) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        runner = Runner(make_config(reward={"use": "model", "path": material.judge}))
        assert runner.data is not None
        rollout = runner.generate(runner.data.take([0, 1, 2]))
        found = runner.score(rollout).scores
        model = AutoModelForSequenceClassification.from_pretrained(material.judge)
        words = AutoTokenizer.from_pretrained(material.judge)
        for row, (prompt, text) in enumerate(zip(rollout.prompts.texts, rollout.texts, strict=True)):
            with torch.no_grad():
                expected = model(torch.tensor([words(prompt + text + "<eos>").input_ids])).logits[0, 0]
            torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-5)

    def test_a_long_text_keeps_its_end(self, material: Material) -> None:
        """The response is what is judged: a text that is too long loses its beginning."""
        reward = RewardModel(ModelReward(path=material.judge, max_tokens=8), "cpu")
        same_end = reward(fake_rollout([("one beginning of", " the same end"), ("another one of", " the same end")]))
        torch.testing.assert_close(same_end[0], same_end[1])
        other_end = reward(
            fake_rollout([("one beginning of", " the same end"), ("one beginning of", " another close")])
        )
        assert float((other_end[0] - other_end[1]).abs()) > 1e-3

    def test_a_chat_is_not_given_two_beginnings(self, material: Material, tmp_path: Path) -> None:
        """A template that writes <bos> and a tokenizer that adds it would give two."""
        from tokenizers.processors import TemplateProcessing
        from transformers import PreTrainedTokenizerFast

        folder = shutil.copytree(material.judge, tmp_path / "judge")
        words = PreTrainedTokenizerFast.from_pretrained(folder)
        words.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
        words.chat_template = "<bos>{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
        words.save_pretrained(folder)
        reward = RewardModel(ModelReward(path=str(folder)), "cpu")
        seen: list[Tensor] = []
        reward._model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"]), with_kwargs=True)
        rollout = fake_rollout([("hi", " you")])
        messages = [{"role": "user", "content": "hi"}]
        chat = type(rollout)(
            type(rollout.prompts)(rollout.prompts.ids, rollout.prompts.mask, rollout.prompts.rows, [messages]),
            rollout.ids,
            rollout.mask,
            rollout.texts,
            rollout.finished,
        )
        reward(chat)
        reward(rollout)
        assert [int((ids == 1).sum()) for ids in seen] == [1, 1]
        assert words.decode(seen[0][0]) == "<bos>user:hiassistant: you"
