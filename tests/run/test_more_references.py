"""References beyond the three: one that follows the policy, one that is a model of its own, and none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from marl_core import (
    AdapterBank,
    ConfigError,
    DataError,
    Plan,
    PluginError,
    RunConfig,
    Runner,
    Strategy,
    View,
    hookimpl,
)
from marl_core.bank.merge import merge_adapter
from marl_core.ppo.budget import PassLimits
from marl_core.testing import write_tiny_model

MakeConfig = Callable[..., RunConfig]
STEPS = 3


def tensors(runner: Runner, adapter: str) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in runner.bank.tensors(adapter).items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def step_zero(runner: Runner) -> str:
    return next(check.detail for check in runner.prepare().checks if check.name == "reference")


class TestEmaAdapter:
    def test_it_is_the_moving_average(self, make_config: MakeConfig) -> None:
        runner = Runner(make_config(reference={"use": "ema-adapter", "decay": 0.75}, ppo={"steps": STEPS}))
        expected = tensors(runner, "policy")
        assert equal(tensors(runner, "policy-reference"), expected)
        assert "step-0 KL is bitwise 0" in step_zero(runner)
        kl = []
        for stats in runner.steps():
            policy = tensors(runner, "policy")
            expected = {name: 0.75 * tensor + 0.25 * policy[name] for name, tensor in expected.items()}
            found = tensors(runner, "policy-reference")
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-7)
            kl.append(stats.kl_nats)
        assert abs(kl[0]) < 1e-4  # log-probs seen while sampling: zero up to rounding
        assert all(abs(value) > 1e-4 for value in kl[1:])

    def test_a_copy_every_n_steps(self, make_config: MakeConfig) -> None:
        config = make_config(reference={"use": "ema-adapter", "decay": 0.0, "every": 2}, ppo={"steps": STEPS})
        runner = Runner(config)
        start, same = tensors(runner, "policy"), []
        for _ in runner.steps():
            reference = tensors(runner, "policy-reference")
            same.append((equal(reference, start), equal(reference, tensors(runner, "policy"))))
        assert same == [(True, False), (False, True), (False, False)]

    def test_it_starts_where_a_continued_policy_starts(self, make_config: MakeConfig, sft_adapter: str) -> None:
        runner = Runner(make_config(policy={"start": "continue", "from": sft_adapter}, reference="ema-adapter"))
        assert "step-0 KL is bitwise 0" in step_zero(runner)
        assert runner.plan.warnings() == []

    def test_it_moves_in_a_loop_of_ones_own(self, make_config: MakeConfig) -> None:
        runner = Runner(make_config(reference={"use": "ema-adapter", "decay": 0.0, "every": 2}))
        assert runner.data is not None
        for step in (1, 2):
            runner.update(runner.score(runner.generate(runner.data.take([0, 1, 2, 3]))))
            assert equal(tensors(runner, "policy"), tensors(runner, "policy-reference")) == (step == 2)

    def test_it_is_not_trained(self, make_config: MakeConfig) -> None:
        runner = Runner(make_config(reference="ema-adapter"))
        assert runner.bank.trainable == {"policy"}
        assert not any(p.requires_grad for p in runner.bank.parameters("policy-reference").values())

    def test_two_policies_on_one_bank_have_one_each(self, make_config: MakeConfig) -> None:
        first = Runner(make_config(reference="ema-adapter"))
        moving = {"use": "ema-adapter", "decay": 0.0, "every": 2}
        second = Runner(make_config(reference=moving), bank=first.bank, policy="other")
        before = tensors(first, "policy-reference")
        assert len(list(second.steps())) == 2
        assert equal(tensors(second, "other-reference"), tensors(second, "other"))
        assert equal(tensors(first, "policy-reference"), before)

    def test_a_reference_that_would_never_move_is_refused(self, make_config: MakeConfig) -> None:
        with pytest.raises(ConfigError, match=r"reference.every: 9 is more than the 2 steps"):
            Runner(make_config(reference={"use": "ema-adapter", "every": 9}))

    def test_a_reference_that_is_always_the_policy_is_refused(self, make_config: MakeConfig) -> None:
        with pytest.raises(ConfigError, match="the KL would always be 0"):
            Plan.of(make_config(reference={"use": "ema-adapter", "decay": 0.0})).require()

    @pytest.mark.parametrize("stopped_after", [1, 2])
    def test_resume_is_exact(self, make_config: MakeConfig, tmp_path: Path, stopped_after: int) -> None:
        def config(name: str) -> RunConfig:
            return make_config(
                reference={"use": "ema-adapter", "decay": 0.5},
                ppo={"steps": STEPS},
                observers=["json-lines"],
                run={"folder": str(tmp_path / name), "checkpoint_every": 1, "keep": STEPS},
            )

        whole = Runner(config("whole"))
        whole.train()
        shutil.copytree(tmp_path / "whole", tmp_path / "part")
        shutil.rmtree(tmp_path / "part" / "final")
        for step in range(stopped_after + 1, STEPS + 1):
            shutil.rmtree(tmp_path / "part" / "checkpoints" / f"step-{step:06d}")
        resumed = Runner(config("part"), resume=True)
        assert resumed.done == stopped_after
        resumed.train()
        for adapter in ("policy", "policy-reference"):
            assert equal(tensors(resumed, adapter), tensors(whole, adapter)), adapter
        assert lines(tmp_path / "part") == lines(tmp_path / "whole")

    def test_a_checkpoint_without_it_is_refused(self, make_config: MakeConfig, tmp_path: Path) -> None:
        run = {"folder": str(tmp_path / "run"), "checkpoint_every": 1}
        Runner(make_config(run=run, ppo={"steps": 1})).train()
        moving = make_config(run=run, ppo={"steps": 2}, reference="ema-adapter")
        with pytest.raises(DataError, match=r"holds nothing of reference \(ema-adapter of marl-core"):
            Runner(moving, resume=True, override=True)


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k != "time" and not k.startswith("perf/")} for line in found]


class Forgetful(Strategy):
    """A reference that keeps state and can't take it back."""

    @hookimpl
    def marl_reference(self) -> View:
        return View(None)

    @hookimpl
    def marl_state(self) -> dict[str, Tensor]:
        return {"mine": torch.zeros(1)}


def test_state_that_cannot_be_restored_is_the_plugins_fault(make_config: MakeConfig, tmp_path: Path) -> None:
    run = {"folder": str(tmp_path / "run"), "checkpoint_every": 1, "device": "cpu"}
    written = make_config(run=run, ppo={"steps": 1}).model_dump(by_alias=True)
    config = RunConfig.model_validate({**written, "reference": Forgetful()})
    Runner(config).train()
    with pytest.raises(PluginError, match="has marl_state but no marl_restore"):
        Runner(config, resume=True)


class TestModelReference:
    def test_a_merged_model_is_where_the_continued_policy_starts(
        self, make_config: MakeConfig, tiny_folder: str, sft_adapter: str, tmp_path: Path
    ) -> None:
        """Weights elsewhere: W + BA in one model, W and BA in the other. The same up to rounding."""
        merged = str(merge_adapter(tiny_folder, sft_adapter, tmp_path / "merged").out)
        config = make_config(
            policy={"start": "continue", "from": sft_adapter},
            reference={"use": "model", "path": merged, "dtype": "float32", "batch": 3},
            sampling={"max_new_tokens": 6, "min_new_tokens": 2, "temperature": 0.7},
        )
        runner = Runner(config)
        assert "which is rounding" in step_zero(runner)
        steps = list(runner.steps())
        assert abs(steps[0].kl_nats) < 1e-4
        assert steps[1].kl_nats != 0.0
        assert runner.plan.warnings() == []

    def test_another_model_is_refused_at_step_zero(self, make_config: MakeConfig, tmp_path: Path) -> None:
        other = write_tiny_model(tmp_path / "other", seed=7)
        with pytest.raises(ConfigError, match="the reference is not the model the policy starts from"):
            Runner(make_config(reference={"use": "model", "path": other})).prepare()

    def test_another_tokenizer_is_refused(self, make_config: MakeConfig, tiny_folder: str, tmp_path: Path) -> None:
        from transformers import AutoTokenizer

        other = shutil.copytree(tiny_folder, tmp_path / "other")
        words = AutoTokenizer.from_pretrained(other)
        state = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
        state["model"]["vocab"]["a"], state["model"]["vocab"]["b"] = (
            state["model"]["vocab"]["b"],
            state["model"]["vocab"]["a"],
        )
        (other / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
        assert AutoTokenizer.from_pretrained(other).get_vocab() != words.get_vocab()
        with pytest.raises(DataError, match=r"reference.path: the tokenizer of .* isn't the base's"):
            Runner(make_config(reference={"use": "model", "path": str(other)}))

    @pytest.mark.parametrize(
        ("path", "message"), [("nowhere/at/all", "there is no folder"), ("{empty}", "holds no config.json")]
    )
    def test_a_wrong_path_is_said_before_weights_are_read(
        self, make_config: MakeConfig, tmp_path: Path, path: str, message: str
    ) -> None:
        config = make_config(reference={"use": "model", "path": path.format(empty=tmp_path)})
        with pytest.raises(ConfigError, match=message):
            Plan.of(config).require()

    def test_a_damaged_model_names_the_key(self, make_config: MakeConfig, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}", encoding="utf-8")
        with pytest.raises(DataError, match=r"reference.path: .* can't be the reference"):
            Runner(make_config(reference={"use": "model", "path": str(tmp_path)}))


class TestNone:
    def test_without_a_penalty_it_runs(self, make_config: MakeConfig) -> None:
        stats = list(Runner(make_config(reference="none", ppo={"kl": {"coef": 0.0}})).steps())
        assert [step.kl_nats for step in stats] == [0.0, 0.0]

    def test_with_a_penalty_it_is_refused(self, make_config: MakeConfig) -> None:
        with pytest.raises(ConfigError, match=r"reference: none, but ppo.kl.coef is 0.2"):
            Plan.of(make_config(reference="none")).require()


def test_a_bank_may_be_the_reference(tiny_folder: str) -> None:
    """response_logprobs is what the core computes for a view of the same weights."""
    from marl_core import response_logprobs
    from marl_core.ppo.scoring import view_output
    from marl_core.testing import fake_rollout

    bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
    rollout = fake_rollout(tokenizer=bank.tokenizer)
    found = response_logprobs(bank, rollout, 0.5, batch=2)
    assert torch.equal(found, view_output(bank, View(None), rollout, 0.5, PassLimits(2)).logprobs)
    assert not found.requires_grad
