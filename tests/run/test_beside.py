"""Runs beside each other, and log-probs that know whose they are: nothing of one run shows in another's numbers or files."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from marl_core import AdapterBank, Plan, Rollout, Runner, Strategy, hookimpl
from marl_core.bank.trunk import PassOptions

MakeConfig = Callable[..., Any]
NOISE = 5e-5
"""Room for float32 rounding between marl and plain peft on the tiny model: rows of other widths, other kernels."""


def own_logprobs(
    bank: AdapterBank, policy: str, base: str, folder: Path, temperature: float, rollout: Rollout
) -> Tensor:
    """By transformers and plain peft, each row alone, through the adapter as the bank holds it now."""
    bank.save(policy, folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
    found = torch.zeros(rollout.ids.shape)
    for row in range(len(rollout)):
        prompt, answer = rollout.prompts.ids[row][rollout.prompts.mask[row]], rollout.ids[row][rollout.mask[row]]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1] / temperature
        found[row, : len(answer)] = logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
    return found


def moved(runner: Runner, change: Callable[[Tensor], object]) -> None:
    with torch.no_grad():
        for tensor in runner.bank.parameters(runner.roles.trained.policy).values():
            change(tensor)


def push(tensor: Tensor) -> None:
    tensor.add_(0.05)


def swap_data(tensor: Tensor) -> None:
    """Past torch's version counters."""
    tensor.data = tensor.data * 0.5


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda tensor: tensor.mul_(0.5),
    "past the counters": lambda tensor: tensor.data.mul_(0.5),
    "by other storage": swap_data,
    "back to zero": lambda tensor: tensor.zero_(),
}


def write_into(rollout: Rollout) -> Rollout:
    """Past the dataclass, which is frozen; its tensors aren't."""
    rollout.ids[:, 0] = 77
    return rollout


EDITS: dict[str, Callable[[Rollout], Rollout]] = {
    "another token": lambda rollout: replace(rollout, ids=torch.cat([rollout.ids[:, 1:2], rollout.ids[:, 1:]], dim=1)),
    "written in place": write_into,
    "fewer tokens": lambda rollout: replace(rollout, ids=rollout.ids[:, :3], mask=rollout.mask[:, :3]),
    "a shorter mask": lambda rollout: replace(rollout, mask=rollout.mask & (torch.arange(rollout.mask.shape[1]) < 2)),
    "other prompts": lambda rollout: replace(rollout, prompts=rollout.select(torch.tensor([1, 2, 3, 0])).prompts),
}


class TestWhoseLogProbs:
    @pytest.fixture
    def runner(self, make_config: MakeConfig) -> Runner:
        reference = {"use": "disabled-adapter", "allow_mismatch": True}
        made = Runner(make_config(sampling={"max_new_tokens": 6, "temperature": 0.8}, reference=reference))
        moved(made, push)
        return made

    def rollout(self, runner: Runner) -> Rollout:
        assert runner.data is not None
        found = runner.generate(runner.data.take([0, 1, 2, 3]))
        assert found.behavior is not None
        return found

    def check(
        self, runner: Runner, scorer: Runner, rollout: Rollout, base: str, folder: Path, temperature: float
    ) -> None:
        policy = scorer.roles.trained.policy
        wanted = own_logprobs(runner.bank, policy, base, folder, temperature, rollout)
        scored = scorer.score(rollout)
        torch.testing.assert_close(scored.logprobs, wanted, rtol=0, atol=NOISE)

    def test_its_own_are_taken(
        self, runner: Runner, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rollout = self.rollout(runner)
        monkeypatch.setattr("marl_core.ppo.step.view_output", lambda *_, **__: pytest.fail("a pass was made"))
        self.check(runner, runner, rollout, tiny_folder, tmp_path, 0.8)

    @pytest.mark.parametrize("name", CHANGES)
    def test_of_a_policy_that_moved(self, runner: Runner, tiny_folder: str, tmp_path: Path, name: str) -> None:
        rollout = self.rollout(runner)
        moved(runner, CHANGES[name])
        self.check(runner, runner, rollout, tiny_folder, tmp_path, 0.8)

    def test_of_an_adapter_that_counts_more(self, runner: Runner) -> None:
        """Its scaling was changed by hand, its weights weren't."""
        rollout = self.rollout(runner)
        before = runner.score(rollout).logprobs
        layers: list[Any] = list(runner.bank.wrappers("policy").values())
        for layer in layers:
            layer.scaling["default"] *= 2
        assert float((runner.score(rollout).logprobs - before).abs().max()) > 0.01

    def test_after_an_update(self, runner: Runner, tiny_folder: str, tmp_path: Path) -> None:
        rollout = self.rollout(runner)
        runner.update(runner.score(rollout))
        self.check(runner, runner, rollout, tiny_folder, tmp_path, 0.8)

    def test_of_another_policy(self, runner: Runner, make_config: MakeConfig, tiny_folder: str, tmp_path: Path) -> None:
        other = Runner(make_config(sampling={"max_new_tokens": 6, "temperature": 0.8}), bank=runner.bank, policy="two")
        self.check(runner, other, self.rollout(runner), tiny_folder, tmp_path, 0.8)

    def test_of_another_temperature(
        self, runner: Runner, make_config: MakeConfig, tiny_folder: str, tmp_path: Path
    ) -> None:
        """The same weights, in a run that scores at another temperature."""
        other = Runner(make_config(sampling={"max_new_tokens": 6, "temperature": 1.3}), bank=runner.bank, policy="two")
        mine, theirs = (runner.bank.parameters(name).values() for name in ("policy", "two"))
        with torch.no_grad():
            for one, two in zip(mine, theirs, strict=True):
                two.copy_(one)
        self.check(runner, other, self.rollout(runner), tiny_folder, tmp_path, 1.3)

    def test_on_another_base(self, runner: Runner, make_config: MakeConfig, tmp_path: Path) -> None:
        """Both policies are fresh, of one seed and so of the same bits; their bases aren't."""
        from marl_core.testing import write_tiny_model

        base = write_tiny_model(tmp_path / "other", seed=7)
        first, second = Runner(make_config()), Runner(make_config(model={"path": base}))
        rollout = self.rollout(first)
        wanted = own_logprobs(second.bank, "policy", base, tmp_path / "saved", 1.0, rollout)
        torch.testing.assert_close(second.score(rollout).logprobs, wanted, rtol=0, atol=NOISE)

    def test_values_of_a_head_that_moved(self, runner: Runner) -> None:
        rollout = self.rollout(runner)
        head = runner.bank.heads[runner.roles.trained.value_head or ""]
        with torch.no_grad():
            head.bias.add_(3.0)
        scored = runner.score(rollout)
        assert scored.values is not None
        torch.testing.assert_close(scored.values[rollout.mask], torch.full_like(scored.values, 3.0)[rollout.mask])

    def test_they_go_with_their_rollout(self, runner: Runner) -> None:
        rollout = self.rollout(runner)
        assert rollout.behavior is not None
        some = rollout.to("cpu").select(torch.tensor([2, 0])).behavior
        assert some is not None
        assert torch.equal(some.logprobs, rollout.behavior.logprobs[[2, 0]])

    @pytest.mark.parametrize("name", EDITS)
    def test_of_other_tokens(self, runner: Runner, tiny_folder: str, tmp_path: Path, name: str) -> None:
        """A response that was edited, cut, or put behind another prompt is scored as it is now."""
        edited = EDITS[name](self.rollout(runner))
        self.check(runner, runner, edited, tiny_folder, tmp_path, 0.8)


SPEEDS: dict[str, dict[str, Any]] = {
    "packing": {"speed": {"pack": True}},
    "no packing": {"speed": {"pack": False}},
    "checkpointing": {"model": {"gradient_checkpointing": True}},
    "threads": {"run": {"threads": 2}},
    "transformers": {"speed": {"decode": "transformers", "capture": False}},
}


class TestTwoRunners:
    @pytest.mark.parametrize("first", ["packing", "no packing", "checkpointing"])
    @pytest.mark.parametrize("second", SPEEDS)
    def test_one_ends_bitwise_as_by_itself(self, make_config: MakeConfig, first: str, second: str) -> None:
        """Opened before it and stepped in turn with it, with other settings on the same base."""

        def weights(beside: bool) -> list[Tensor]:
            one = Runner(make_config(**SPEEDS[first]))
            turns: Iterator[Any] = iter(())
            if beside:
                turns = Runner(make_config(**SPEEDS[second]), bank=one.bank, policy="two").steps()
            for _ in one.steps():
                next(turns, None)
            mode = [module.training for module in one.bank.base.modules()]
            assert not any(mode)
            return [tensor.detach().clone() for tensor in one.bank.parameters("policy").values()]

        threads = torch.get_num_threads()
        alone, together = weights(False), weights(True)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
        assert torch.get_num_threads() == threads

    def test_the_trunk_is_as_before_after_each_call(self, make_config: MakeConfig) -> None:
        runner = Runner(make_config(speed={"pack": False}, model={"gradient_checkpointing": True}))
        before = runner.bank.trunk.options
        assert before == PassOptions()
        list(runner.steps())
        assert runner.bank.trunk.options is before

    def test_copied_configs_write_into_their_own_folders(self, make_config: MakeConfig, tmp_path: Path) -> None:
        one = make_config(observers=["json-lines"], run={"folder": str(tmp_path / "A")})
        two = one.model_copy(update={"run": one.run.model_copy(update={"folder": str(tmp_path / "B")})})
        first = Runner(one)
        second = Runner(two, bank=first.bank, policy="two")
        for _ in zip(first.steps(), second.steps(), strict=True):
            pass
        for name in "AB":
            lines = (tmp_path / name / "steps.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == [1, 2]


class Counting(Strategy):
    """An observer that a user holds in the hand."""

    _seen: list[int]

    def model_post_init(self, context: Any, /) -> None:
        object.__setattr__(self, "__pydantic_private__", {"_seen": [], "_run": None})

    @hookimpl
    def marl_step_end(self, stats: Any) -> None:
        self._seen.append(stats.step)


class TestStrategies:
    def test_two_runs_from_one_plan_share_none(self, make_config: MakeConfig) -> None:
        plan = Plan.of(make_config(observers=["console"]))
        one, two = Runner(plan), Runner(plan)
        assert set(one.plan.hooks.strategies).isdisjoint(two.plan.hooks.strategies)
        assert one.plan.hooks.around is not two.plan.hooks.around
        assert [str(s) for s in one.plan.hooks.strategies] == [str(s) for s in two.plan.hooks.strategies]

    def test_an_object_serves_one_run_at_a_time(self, make_config: MakeConfig) -> None:
        """The first run has the very object; one beside it a fresh one; a later one the object again."""
        mine = Counting()
        config = make_config()
        config = config.model_copy(
            update={"observers": [make_config(observers=["console"]).observers[0].model_validate({"use": mine})]}
        )
        first = Runner(config)
        beside = Runner(config, bank=first.bank, policy="two")
        assert first.plan.observers == (mine,)
        assert beside.plan.observers != (mine,)
        beside.train()
        assert mine._seen == []
        first.train()
        assert mine._seen == [1, 2]
        third = Runner(config, bank=first.bank, policy="three")
        assert third.plan.observers == (mine,)

    def test_a_run_that_is_gone_holds_nothing(self, make_config: MakeConfig) -> None:
        plan = Plan.of(make_config())
        Runner(plan)
        gc.collect()
        assert Runner(plan).plan.reference is plan.reference


@pytest.mark.parametrize("block", ["no_grad", "inference_mode", "autocast"])
def test_inside_a_block_of_torchs_a_run_is_as_by_itself(make_config: MakeConfig, block: str) -> None:
    """Whoever calls a run from a decorated function: it learns, in the numbers that its config says."""

    def weights(around: Any) -> list[Tensor]:
        with around:
            runner = Runner(make_config())
            list(runner.steps())
        return [tensor.detach().clone() for tensor in runner.bank.parameters("policy").values()]

    blocks: dict[str, Any] = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    }
    alone, inside = weights(nullcontext()), weights(blocks[block])
    assert all(torch.equal(one, other) for one, other in zip(alone, inside, strict=True))


def test_importing_registers_nothing() -> None:
    """What transformers knows of attention is what it knew."""
    code = (
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as known\n"
        "before = sorted(known.keys())\n"
        "from marl_core import AdapterBank, Runner\n"
        "import marl_core.ppo.sampling.decode\n"
        "assert sorted(known.keys()) == before\n"
        "from marl_core.testing import tiny_bank\n"
        "assert tiny_bank().trunk.packs\n"
        "assert 'marl' in known.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
