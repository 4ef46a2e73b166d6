"""Whole small runs on `cuda:0`, real or pretended: every path of marl keeps its tensors on one device, and takes them from any."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from marl_core import (
    AdapterBank,
    NumericError,
    Prompts,
    Rollout,
    Runner,
    Strategy,
    View,
    dump_config,
    hookimpl,
    merge_adapter,
    merge_into,
    response_logprobs,
    write_certificate,
)
from marl_core.cli.app import main
from marl_core.config.run_config import SamplingSection, SpeedSection
from marl_core.ppo.estimators import estimate_advantages
from marl_core.ppo.sampling.sampler import PolicySampler
from marl_core.report.publish import publish_adapter
from marl_core.run.replay import replay
from marl_core.safety.gradient_check import gradient_survives
from marl_core.testing import kinds, tiny_bank, tiny_tokenizer

MakeConfig = Callable[..., Any]
Write = Callable[..., str]


@dataclass(frozen=True)
class Material:
    """Folders of what was trained on the tiny model."""

    base: str
    sft: str
    reward: str
    reward_on_merged: str
    judge: str
    rewards: str
    prompts: str


@pytest.fixture(scope="session")
def material(
    tiny_folder: str,
    sft_adapter: str,
    reward_adapter: str,
    rewards_file: str,
    prompts_file: str,
    write_reward_adapter: Write,
    tmp_path_factory: pytest.TempPathFactory,
) -> Material:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("placed")
    merged = str(merge_adapter(tiny_folder, sft_adapter, folder / "merged").out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1, pad_token_id=0)
    judge.save_pretrained(folder / "judge")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder / "judge")
    on_merged = write_reward_adapter(merged, folder / "reward-on-merged")
    return Material(
        tiny_folder, sft_adapter, reward_adapter, on_merged, str(folder / "judge"), rewards_file, prompts_file
    )


def trained(config: Any, **options: Any) -> Runner:
    """A run to its end, whose weights, optimizer state and numbers are where they belong."""
    runner = Runner(config, **options)
    result = runner.train()
    assert runner.bank.device == torch.device("cuda", 0)
    held = [*runner.bank.base.state_dict().values(), *(head.weight for head in runner.bank.heads.values())]
    assert all(tensor.is_cuda for tensor in held)
    moments = [value for state in runner.optimizer.state.values() for key, value in state.items() if key != "step"]
    assert moments
    assert all(moment.is_cuda for moment in moments)
    assert result.last is not None
    assert all(math.isfinite(value) for value in result.last.metrics.values())
    return runner


RUNS: dict[str, Callable[[Material], dict[str, Any]]] = {
    "the usual": lambda m: {},
    "disabled-adapter, a reward adapter": lambda m: {"reward": {"use": "adapter", "path": m.reward}},
    "merged-base, a reward adapter on it": lambda m: {
        "reference": {"use": "merged-base", "adapter": m.sft},
        "reward": {"use": "adapter", "path": m.reward_on_merged},
    },
    "peft-adapter, a policy that goes on": lambda m: {
        "reference": {"use": "peft-adapter", "adapter": m.sft},
        "policy": {"start": "continue", "from": m.sft, "dropout": 0.1},
    },
    "ema-adapter": lambda m: {"reference": {"use": "ema-adapter", "decay": 0.5}},
    "a reference model, a reward model": lambda m: {
        "reference": {"use": "model", "path": m.base, "dtype": "float32"},
        "reward": {"use": "model", "path": m.judge},
    },
    "no reference, process reward": lambda m: {
        "reference": "none",
        "ppo": {"kl": {"coef": 0.0}},
        "reward": {"use": "process", "target": f"{m.rewards}:each", "per": "token"},
    },
    "several rewards": lambda m: {
        "reward": [
            {"use": "function", "target": f"{m.rewards}:odd", "name": "odd", "weight": 2.0},
            {"use": "adapter", "path": m.reward},
            {"use": "length-format", "pattern": "a", "max_tokens": 4, "cushion": 2},
            {"use": "process", "target": f"{m.rewards}:each", "per": "token"},
        ],
        "shaping": {"normalize": True, "missing_eos_penalty": 1.0, "clip": 3.0},
    },
    "a value of its own": lambda m: {"value": {"on": "own", "r": 2}},
    "rloo": lambda m: {"value": "none", "ppo": {"advantage": "rloo", "samples_per_prompt": 2}},
    "grpo, the KL in the loss": lambda m: {
        "value": "none",
        "ppo": {"advantage": "grpo", "samples_per_prompt": 2, "entropy_coef": 0.01, "kl": {"into": "loss"}},
    },
    "everything of ppo": lambda m: {
        "ppo": {
            "entropy_coef": 0.01,
            "max_kl": 100.0,
            "aggregation": "sequence",
            "dual_clip": 3.0,
            "schedule": "cosine",
            "warmup_steps": 1,
            "kl": {"coef": 0.2, "target": 0.5, "horizon": 40, "estimator": "k3"},
        },
        "policy": {"dropout": 0.1},
    },
    "sampled by transformers": lambda m: {
        "speed": {"decode": "transformers"},
        "sampling": {"temperature": 0.7, "stop_strings": ["a"], "rows": 2},
    },
    "sampled by transformers, two tokens at least": lambda m: {
        "speed": {"decode": "transformers", "pack": False},
        "sampling": {"min_new_tokens": 2},
    },
    "sampled by marl": lambda m: {"sampling": {"temperature": 0.7, "stop_strings": ["a"], "rows": 2}},
    "sampled by marl, two tokens at least": lambda m: {
        "sampling": {"min_new_tokens": 2},
        "speed": {"capture": False},
    },
    "top_p and top_k, merged copies": lambda m: {
        "sampling": {"top_p": 0.9, "top_k": 20},
        "speed": {"merge_for_sampling": True},
    },
    "neither packed nor captured": lambda m: {"speed": {"pack": False, "capture": False}},
    "packed, not captured": lambda m: {"speed": {"capture": False}},
    "recomputed": lambda m: {"model": {"gradient_checkpointing": True}, "policy": {"dropout": 0.1}},
    "recomputed, in microbatches, value of its own": lambda m: {
        "model": {"gradient_checkpointing": True},
        "ppo": {"microbatch": 1},
        "value": {"on": "own", "r": 2},
        "speed": {"pack": False},
    },
    "few tokens a pass": lambda m: {"speed": {"microbatch_tokens": 16}},
    "bfloat16": lambda m: {"model": {"dtype": "bfloat16"}},
    "eager attention": lambda m: {"model": {"attention": "eager"}},
    "dora": lambda m: {"policy": {"lora": {"use_dora": True}}},
    "judged on held-out prompts": lambda m: {
        "eval": {
            "prompts": m.prompts,
            "every": 1,
            "limit": 3,
            "seeds": 2,
            "judges": {
                "odd": {"use": "function", "target": f"{m.rewards}:odd"},
                "adapter": {"use": "adapter", "path": m.reward},
                "model": {"use": "model", "path": m.judge},
            },
        }
    },
}


@pytest.fixture(scope="session")
def rewards_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Reward functions, one of which scores every token."""
    file = tmp_path_factory.mktemp("rewards") / "rewards.py"
    file.write_text(
        "def odd(completion_ids, **columns):\n"
        "    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]\n\n\n"
        "def each(completion_ids, **columns):\n"
        "    return [[token % 2 / 2 for token in ids] for ids in completion_ids]\n",
        encoding="utf-8",
    )
    return str(file)


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_whole_run(changes: Callable[[Material], dict[str, Any]], material: Material, on_cuda: MakeConfig) -> None:
    trained(on_cuda(**changes(material)))


SIZES: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MODELS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "learned positions": (
        lambda t: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
        ),
        {},
    ),
    "logits with a cap, sliding windows": (
        lambda t: t.Gemma2ForCausalLM(t.Gemma2Config(**SIZES, sliding_window=4, final_logit_softcapping=30.0)),
        {"sampling": {"min_new_tokens": 2}, "ppo": {"entropy_coef": 0.01}},
    ),
    "frequencies that depend on the row": (
        lambda t: t.LlamaForCausalLM(
            t.LlamaConfig(**{**SIZES, "max_position_embeddings": 20}, rope_parameters=DYNAMIC)
        ),
        {},
    ),
    "experts, adapted": (
        lambda t: t.Qwen3MoeForCausalLM(
            t.Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
        ),
        {"policy": {"targets": ["q_proj"], "lora": {"target_parameters": EXPERTS}}},
    ),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:RuntimeWarning:peft")
@pytest.mark.parametrize(("build", "changes"), MODELS.values(), ids=MODELS)
def test_a_model_of_another_kind(
    build: Callable[[Any], Any], changes: dict[str, Any], on_cuda: MakeConfig, tmp_path: Path
) -> None:
    import transformers

    torch.manual_seed(0)
    build(transformers).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    trained(on_cuda(model={"path": str(tmp_path / "model")}, **changes))


def test_auto_is_cuda(on_cuda: MakeConfig) -> None:
    assert Runner(on_cuda(run={"device": "auto"})).bank.device.type == "cuda"


class TestRunFolder:
    """A run with a folder: what it writes can be gone on with, replayed, merged, published, and read on a CPU."""

    def test_resume_goes_on_where_it_was(self, on_cuda: MakeConfig, tmp_path: Path) -> None:
        def config(folder: str, steps: int) -> Any:
            return on_cuda(
                value={"on": "own", "r": 2},
                policy={"dropout": 0.1},
                reference={"use": "ema-adapter", "decay": 0.5},
                shaping={"normalize": True},
                ppo={"steps": steps},
                run={"folder": str(tmp_path / folder), "checkpoint_every": 1},
            )

        whole = trained(config("whole", 3))
        steps = Runner(config("halves", 3)).steps()
        next(steps)
        steps.close()  # type: ignore[attr-defined]  # it is a generator
        gc.collect()
        again = trained(config("halves", 3), resume=True)
        for name in ("policy", "policy-reference"):
            mine, theirs = whole.bank.tensors(name), again.bank.tensors(name)
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)

    def test_a_cuda_checkpoint_is_resumed_on_a_cpu(
        self, on_cuda: MakeConfig, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        run = {"folder": str(tmp_path / "run"), "checkpoint_every": 1}
        next(Runner(on_cuda(run=run)).steps())
        gc.collect()
        runner = Runner(make_config(run={**run, "device": "cpu"}), resume=True, override=True)
        assert [stats.step for stats in runner.steps()] == [2]
        assert runner.bank.device.type == "cpu"

    @pytest.mark.parametrize("phase", ["score", "update"])
    def test_a_dump_is_replayed(self, phase: str, on_cuda: MakeConfig, tmp_path: Path) -> None:
        runner = Runner(on_cuda(run={"folder": str(tmp_path / "run"), "checkpoint_every": 1}))
        steps = runner.steps()
        next(steps)
        assert runner.data is not None
        rollout = runner.generate(runner.data.take([0, 1, 2, 3]))
        if phase == "score":
            with torch.no_grad():
                for weight in runner.bank.parameters("policy").values():
                    weight.fill_(torch.nan)
            with pytest.raises(NumericError, match="marl replay") as caught:
                runner.score(rollout)
        else:
            scored = runner.score(rollout)
            advantages = estimate_advantages(scored, runner.config.ppo)
            advantages.advantages.fill_(torch.inf)
            with pytest.raises(NumericError, match="marl replay") as caught:
                runner.update(scored, advantages)
        (folder,) = (tmp_path / "run" / "dumps").iterdir()
        found = replay(folder)
        assert found.phase == phase
        assert type(found.now) is type(caught.value)

    def test_the_command_line(self, on_cuda: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder, file = tmp_path / "run", tmp_path / "run.yaml"
        config = on_cuda(run={"folder": str(folder)}, observers=["console", "json-lines"])
        file.write_text(dump_config(config), encoding="utf-8")
        assert main(["check", str(file), "--memory"]) == 0
        assert main(["run", str(file)]) == 0
        assert main(["report", str(folder)]) == 0
        assert "cuda" in (folder / "provenance.json").read_text(encoding="utf-8")
        card = publish_adapter(folder, tmp_path / "published")
        assert (card / "README.md").is_file()
        out = tmp_path / "merged"
        adapter = str(folder / "final" / "policy")
        assert main(["merge", "--model", config.model.path, "--adapter", adapter, "--out", str(out)]) == 0
        assert AdapterBank.from_pretrained(str(out), device="cuda").device.type == "cuda"
        bank = AdapterBank.from_pretrained(config.model.path, device="cuda")
        bank.load("policy", adapter, trainable=True)
        assert all(tensor.is_cuda for tensor in bank.tensors("policy").values())

    def test_two_runners_on_one_bank(self, on_cuda: MakeConfig, material: Material) -> None:
        one = Runner(on_cuda(policy={"dropout": 0.1}, reward={"use": "adapter", "path": material.reward}))
        two = Runner(on_cuda(value={"on": "own", "r": 2}), bank=one.bank, policy="other")
        for _ in zip(one.steps(), two.steps(), strict=True):
            assert one.bank is two.bank


class Given(Strategy):
    """A reward and a reference that answer with tensors wherever they like."""

    where: str

    @hookimpl
    def marl_reward(self) -> Any:
        def score(rollout: Rollout) -> Any:
            numbers = rollout.mask.sum(dim=1).float()
            kinds = {"cpu": numbers.cpu(), "cuda": numbers, "numpy": numbers.cpu().numpy(), "numbers": list(numbers)}
            kinds["tokens"] = (rollout.ids % 2).float()
            return kinds[self.where]

        return score


class Elsewhere(Strategy):
    """A reference that gives its log-probs on the CPU."""

    @hookimpl
    def marl_reference(self, bank: AdapterBank, temperature: float) -> Any:
        return lambda rollout: response_logprobs(bank, rollout, temperature).cpu()


@pytest.fixture
def runner(on_cuda: MakeConfig) -> Runner:
    return Runner(on_cuda(data=None))


def prompts_of(bank: AdapterBank, *texts: str) -> Prompts:
    words = bank.tokenizer
    return Prompts.of([words(text).input_ids for text in texts], words.pad_token_id, texts=texts)


TEXTS = ("A good", "Bad", "I never", "It")


class TestDoors:
    """A user's own tensors may be on either device."""

    @pytest.mark.parametrize("where", ["cpu", "cuda", "numpy", "numbers", "tokens"])
    def test_a_reward_answers_from_anywhere(self, where: str, on_cuda: MakeConfig) -> None:
        config = on_cuda()
        written = config.model_dump(by_alias=True)
        objects = type(config).model_validate({**written, "reward": [Given(where=where)], "reference": Elsewhere()})
        trained(objects)

    @pytest.mark.parametrize("place", ["cpu", "cuda"])
    def test_a_loop_of_ones_own(self, place: str, runner: Runner) -> None:
        prompts = prompts_of(runner.bank, *TEXTS).to(place)
        limits = torch.tensor([1, 2, 3, 6], device=place)
        rollout = runner.generate(prompts, limits=limits).to(place)
        assert bool((rollout.lengths.cpu() <= limits.cpu()).all())
        scored = runner.score(rollout, torch.arange(4.0, device=place))
        assert scored.scores.is_cuda
        own = scored.to(place)
        advantages = estimate_advantages(scored, runner.config.ppo).to(place)
        stats = runner.update(own, advantages)
        assert math.isfinite(runner.finish(own, advantages, stats).reward_mean)
        rollout = runner.generate(prompts)
        scored = runner.score(rollout)
        advantages = estimate_advantages(scored, runner.config.ppo).to(place)
        stats = runner.update(scored, advantages)
        assert math.isfinite(runner.finish(scored, advantages, stats).reward_mean)

    @pytest.mark.parametrize("own", [list(range(4)), np.arange(4.0), [torch.tensor(1.0)] * 4])
    def test_own_scores_of_any_kind(self, own: Any, runner: Runner) -> None:
        rollout = runner.generate(prompts_of(runner.bank, *TEXTS))
        assert runner.score(rollout, own).scores.is_cuda
        assert runner.score(rollout, torch.ones(rollout.ids.shape)).scores.is_cuda

    @pytest.mark.parametrize("place", ["cpu", "cuda"])
    def test_tokens_from_anywhere(self, place: str, runner: Runner) -> None:
        words = runner.bank.tokenizer
        ids: Any = torch.tensor([[5, 6], [0, 7]], device=place)  # any numbers are taken
        prompts = Prompts.of(ids, words.pad_token_id, mask=torch.tensor([[1, 1], [0, 1]], device=place))
        responses: Any = torch.tensor([[8, 9, 2], [10, 2, 0]], device=place)
        rollout = Rollout.from_responses(prompts, responses, words)
        for one in (rollout, rollout.to("cuda"), rollout.to("cuda").to("cpu")):
            assert runner.score(one).logprobs.is_cuda
        mixed = Rollout(prompts.to("cuda"), rollout.ids.cpu(), rollout.mask.to("cuda"), rollout.texts, rollout.finished)
        assert mixed.sequence_ids.is_cpu
        assert runner.score(mixed).logprobs.is_cuda

    @pytest.mark.parametrize("place", ["cpu", "cuda"])
    @pytest.mark.parametrize("rows", ["cpu", "cuda"])
    def test_rows_are_picked_by_an_index_from_anywhere(self, place: str, rows: str, runner: Runner) -> None:
        rollout = runner.generate(prompts_of(runner.bank, *TEXTS)).to(place)
        for index in (torch.tensor([2, 0], device=rows), torch.tensor([True, False, True, False], device=rows)):
            picked = rollout.select(index)
            assert len(picked) == 2
            assert picked.ids.device.type == place
            assert runner.score(picked).logprobs.is_cuda
        assert torch.equal(rollout.select(torch.tensor([2, 0], device=rows)).ids, rollout.ids[[2, 0]])

    @pytest.mark.parametrize("place", ["cpu", "cuda"])
    def test_response_logprobs_come_back_where_the_rollout_is(self, place: str, runner: Runner) -> None:
        rollout = runner.generate(prompts_of(runner.bank, *TEXTS)).to(place)
        assert response_logprobs(runner.bank, rollout).device.type == place

    @pytest.mark.parametrize("place", ["cpu", "cuda"])
    def test_a_bank_scores_tokens_from_anywhere(self, place: str, device: torch.device, material: Material) -> None:
        bank = AdapterBank.from_pretrained(material.base, device="cuda")
        view = bank.load_reward(material.reward)
        ids, mask = torch.tensor([[5, 6, 7]], device=place), torch.ones(1, 3, device=place)
        assert bank.score(view, ids, mask).shape == (1,)


class TestBank:
    @pytest.fixture
    def bank(self, device: torch.device) -> AdapterBank:
        return tiny_bank(policy="policy", device="cuda")

    def test_the_gradient_check(self, bank: AdapterBank) -> None:
        assert gradient_survives(bank, "policy").ok

    @pytest.mark.parametrize("decode", ["marl", "transformers"])
    def test_a_seed_decides_what_is_sampled_and_leaves_the_random_states(self, decode: Any, bank: AdapterBank) -> None:
        sampling, speed = SamplingSection(max_new_tokens=6), SpeedSection(decode=decode)
        before = torch.get_rng_state(), torch.cuda.get_rng_state()
        one = PolicySampler(bank, "policy", sampling, (2,), speed)(prompts_of(bank, *TEXTS), 3)
        bank.add("other", kinds.make_config(4, 8, "all-linear", 0.0, {}, bank.linears), seed=0)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert torch.equal(torch.cuda.get_rng_state(), before[1])
        torch.rand(3, device=bank.device)
        two = PolicySampler(bank, "policy", sampling, (2,), speed)(prompts_of(bank, *TEXTS), 3)
        assert torch.equal(one.ids, two.ids)

    def test_adapters_come_and_go(self, bank: AdapterBank, material: Material, tmp_path: Path) -> None:
        bank.load("sft", material.sft)
        bank.add_value_head("value")
        bank.save("policy", tmp_path / "policy")
        before = bank.checksum("policy", "value")
        bank.remove("sft")
        bank.load("again", tmp_path / "policy")
        assert all(tensor.is_cuda for tensor in bank.tensors("again").values())
        assert all(
            torch.equal(a, b)
            for a, b in zip(bank.tensors("again").values(), bank.tensors("policy").values(), strict=True)
        )
        assert bank.checksum("policy", "value") == before
        with bank.view(View("again")):
            assert bank.trunk.hidden(
                torch.tensor([[4, 5]], device=bank.device), torch.ones(1, 2, device=bank.device).bool()
            ).is_cuda

    def test_merging_into_a_model_on_the_device(self, device: torch.device, material: Material) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(material.base)
        merged = merge_into(model.to("cuda"), material.sft)
        assert all(tensor.is_cuda for tensor in merged.state_dict().values())

    def test_a_certificate(
        self, device: torch.device, material: Material, write_reward_adapter: Write, tmp_path: Path
    ) -> None:
        folder = write_reward_adapter(material.base, tmp_path / "reward")
        write_certificate(folder, material.base, ["A good film", "Bad"])
        bank = AdapterBank.from_pretrained(material.base, device="cuda")
        bank.load_reward(folder)
        assert bank.reward_checks

    def test_equal_fingerprints_on_both_devices(self, device: torch.device, material: Material) -> None:
        one, other = (AdapterBank.from_pretrained(material.base, device=kind) for kind in ("cpu", "cuda"))
        assert one.fingerprint == other.fingerprint
