"""The pre-flight check looks at a policy that has moved: each fault here changes nothing of a fresh one, whose update is zero."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from marl_core import AdapterBank, ConfigError, NumericError, RunConfig, Runner
from marl_core.safety.findings import PreflightCheck
from marl_core.safety.first_step import LARGE_STEP, SMALL_STEP, FirstStep, first_move, moved_policy, step_check

MakeConfig = Callable[..., RunConfig]
Change = Callable[[Tensor, Tensor], Tensor]
"""What a stand-in does: a layer's input and its output -> another output."""
USUAL: dict[str, Any] = {"learning_rate": 1e-4}


def check(runner: Runner) -> dict[str, PreflightCheck]:
    """Each check of a run by name."""
    assert runner.data is not None
    return {found.name: found for found in runner.check_start(runner.data.batch(0, 4, 0)).checks}


def part(bank: AdapterBank, ending: str) -> nn.Module:
    """The module of the policy whose weight is the first parameter with this in its name."""
    weight = next(p for name, p in bank.parameters("policy").items() if ending in name)
    with bank.using("policy") as base:
        return next(module for module in base.modules() if getattr(module, "weight", None) is weight)


@contextmanager
def changed(module: nn.Module, change: Change) -> Iterator[None]:
    """A block in which a layer gives something else."""
    hook = module.register_forward_hook(lambda _, inputs, output: change(inputs[0], output))
    try:
        yield
    finally:
        hook.remove()


def averages(inputs: Tensor, output: Tensor) -> Tensor:
    """Lily's kind: each token sees the mean of its sequence."""
    return output + output.mean(dim=-2, keepdim=True)


def draws(inputs: Tensor, output: Tensor) -> Tensor:
    """PVeRA's kind: noise in the pass that trains."""
    return output * (1 + 0.3 * torch.randn_like(output)) if torch.is_grad_enabled() else output


def other_in_a_batch(inputs: Tensor, output: Tensor) -> Tensor:
    """Right for one row, packed ones too, and wrong for rows one below the other."""
    return 2 * output if len(inputs) > 1 else output


def other_with_a_cache(inputs: Tensor, output: Tensor) -> Tensor:
    """An adapter that takes a token alone for the first one."""
    return 2 * output if inputs.shape[-2] == 1 else output


class TestFaults:
    @pytest.mark.parametrize(
        ("change", "options", "message"),
        [
            (draws, {}, r"ratio on the first minibatch is off by up to .* draws at random while it trains \(PVeRA"),
            (
                averages,
                {},
                r"each row alone and in its batch differ by up to .*That is the adapter's kind: its layers look",
            ),
            (
                averages,
                {"speed": {"pack": False}},
                r"log-probs as sampled and as scored differ by .*the adapter's kind",
            ),
            (other_in_a_batch, {}, r"packed and padded rows differ by .*the adapter's kind"),
            (
                other_with_a_cache,
                {},
                r"log-probs as sampled and as scored differ by .*the adapter's kind: with a cache",
            ),
        ],
    )
    def test_what_only_shows_once_it_has_moved_is_refused(
        self, make_config: MakeConfig, change: Change, options: dict[str, Any], message: str
    ) -> None:
        runner = Runner(make_config(ppo=USUAL, **options))
        wrong = pytest.raises(NumericError, match=rf"pre-flight: {message}")
        with changed(part(runner.bank, "q_proj.lora_A"), change), wrong as caught:
            check(runner)
        assert "use vera or lora" in str(caught.value) or "Use another kind, e.g. lora." in str(caught.value)
        check(runner)  # and is gone with the fault

    def test_the_base_is_named_where_it_is_the_base(self, make_config: MakeConfig) -> None:
        runner = Runner(make_config(ppo={**USUAL, "kl": {"coef": 0.0}}))
        attention = next(m for name, m in runner.bank.base.named_modules() if name.endswith("layers.0.input_layernorm"))
        with changed(attention, averages), pytest.raises(NumericError, match=r"Set speed\.pack: false") as caught:
            check(runner)
        assert "and those of the bare base by" in str(caught.value)
        assert "the adapter's kind" not in str(caught.value)

    def test_a_file_that_lacks_what_was_drawn_is_refused(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save = AdapterBank.save

        def forgets(bank: AdapterBank, name: str, folder: str | Path) -> None:
            save(bank, name, folder)
            file = Path(folder) / "adapter_model.safetensors"
            tensors = load_file(file)
            first = next(name for name in tensors if "lora_A" in name)
            save_file({**tensors, first: torch.ones_like(tensors[first])}, file)

        monkeypatch.setattr(AdapterBank, "save", forgets)
        runner = Runner(make_config(ppo=USUAL))
        with pytest.raises(ConfigError, match=r"made from the policy's own saved file gives other log-probs .*lora\."):
            check(runner)
        assert runner.bank.adapters == ["policy"]

    def test_a_file_that_can_not_be_written_is_said(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(AdapterBank, "save", full)
        found = check(Runner(make_config(ppo=USUAL)))["file"]
        assert not found.ok
        assert found.detail.endswith("wasn't tried: No space left on device")


class TestGradient:
    def test_its_share_is_said(self, make_config: MakeConfig) -> None:
        found = check(Runner(make_config(ppo=USUAL)))["gradient"]
        assert found.ok
        assert found.numbers["share"] == 1.0
        assert found.detail.endswith("it reaches 28 of 28 tensors that learn")

    def test_a_part_that_learns_nothing_is_said(self, make_config: MakeConfig) -> None:
        runner = Runner(make_config(ppo=USUAL))
        with changed(part(runner.bank, "layers.1.mlp.down_proj.lora_B"), lambda _, output: output.detach()):
            found = check(runner)["gradient"]
        assert not found.ok
        assert found.numbers["share"] == 26 / 28
        assert (
            "reaches 26 of 28 tensors that learn, none of the others (first: model.layers.1.mlp.down_proj"
            in found.detail
        )

    def test_none_at_all_is_refused_with_its_causes(self, make_config: MakeConfig) -> None:
        runner = Runner(make_config(policy={"targets": ["down_proj"]}, ppo=USUAL))
        modules = [part(runner.bank, f"layers.{layer}.mlp.down_proj.lora_B") for layer in (0, 1)]
        zero: Change = lambda _, output: 0 * output  # noqa: E731
        with changed(modules[0], zero), changed(modules[1], zero), pytest.raises(NumericError) as caught:
            check(runner)
        assert "the policy's gradient is 0 on the first prompts, so nothing would learn" in str(caught.value)
        assert "the output layer" in str(caught.value)
        assert "tokens that the prompts don't hold" in str(caught.value)


class TestStep:
    @pytest.mark.parametrize(("decay", "clip", "eps"), [(0.0, None, 1e-5), (0.1, 1.0, 1e-5), (0.0, 0.1, 1e-3)])
    def test_it_is_adamws_first(self, decay: float, clip: float | None, eps: float) -> None:
        torch.manual_seed(0)
        parameters = {name: nn.Parameter(torch.randn(3, 4)) for name in ("a", "b")}
        gradients = {name: torch.randn(3, 4) * 1e-3 * 10**power for power, name in enumerate(parameters)}
        groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters.values(), (1e-3, 1e-2), strict=True)]
        optimizer = torch.optim.AdamW(groups, eps=eps, weight_decay=decay)
        moves = first_move(optimizer, parameters, gradients, clip)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        for name, p in parameters.items():
            p.grad = gradients[name].clone()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters.values(), clip)
        optimizer.step()
        for name, p in parameters.items():
            torch.testing.assert_close(p.detach(), before[name] + moves[name], rtol=1e-6, atol=1e-8)
            assert moves[name].abs().max() > 1e-6

    def test_the_full_rate_counts_where_it_warms_up(self, make_config: MakeConfig) -> None:
        plain, warmed = (
            check(Runner(make_config(ppo={**USUAL, **more})))["step"] for more in ({}, {"warmup_steps": 100})
        )
        assert plain.numbers == warmed.numbers

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_it_grows_with_the_rate_and_is_told_below_rounding(self, make_config: MakeConfig, dtype: str) -> None:
        nats = {}
        for rate in (1e-8, 1e-6, 1e-4):
            runner = Runner(make_config(model={"dtype": dtype}, ppo={"learning_rate": rate}))
            nats[rate] = check(runner)["step"].numbers["nats"]
        assert nats[1e-6] / nats[1e-8] == pytest.approx(100, rel=0.2)
        assert nats[1e-4] / nats[1e-6] == pytest.approx(100, rel=0.2)

    def test_half_precision_says_what_float32_says(self, make_config: MakeConfig) -> None:
        exact, rounded = (
            check(Runner(make_config(model={"dtype": dtype}, ppo=USUAL)))["step"].numbers["nats"]
            for dtype in ("float32", "bfloat16")
        )
        assert rounded == pytest.approx(exact, rel=0.5)  # other tokens are sampled

    @pytest.mark.parametrize(
        ("rate", "ok", "said"),
        [
            (1e-4, True, ""),
            (1e-9, False, "next to nothing: .* wants a higher ppo.learning_rate, about "),
            (0.1, False, "a step far too large: .* Lower ppo.learning_rate, to about "),
            (1e8, False, "a step far too large"),
        ],
    )
    def test_it_is_always_said_and_warned_of(self, make_config: MakeConfig, rate: float, ok: bool, said: str) -> None:
        found = check(Runner(make_config(ppo={"learning_rate": rate})))["step"]
        assert found.ok == ok
        assert found.detail.startswith(f"one step at {rate:.3g} moves the policy by ")
        assert re.search(said, found.detail)

    def test_the_rate_that_is_named_is_one(self, make_config: MakeConfig) -> None:
        for rate in (1e-9, 0.1, 1e4):
            detail = check(Runner(make_config(ppo={"learning_rate": rate})))["step"].detail
            better = float(detail.rpartition("about ")[2])
            assert check(Runner(make_config(ppo={"learning_rate": better})))["step"].ok

    @pytest.mark.parametrize(("nats", "ok"), [(SMALL_STEP, True), (LARGE_STEP, True), (9e-6, False), (0.51, False)])
    def test_its_bounds(self, nats: float, ok: bool) -> None:
        assert step_check(FirstStep(nats, 1.0, nats), 1e-5).ok == ok


class TestPutBack:
    @pytest.mark.parametrize("fails", [False, True])
    def test_the_policy_has_its_bytes_back(self, make_config: MakeConfig, fails: bool) -> None:
        runner = Runner(make_config(policy={"dropout": 0.1}, ppo=USUAL))
        bank, checksum = runner.bank, runner.bank.checksum("policy")
        head = bank.checksum(*bank.heads)
        with changed(part(bank, "q_proj.lora_A"), averages if fails else (lambda _, output: output)):
            if fails:
                with pytest.raises(NumericError):
                    check(runner)
            else:
                check(runner)
        assert bank.checksum("policy") == checksum
        assert bank.checksum(*bank.heads) == head
        assert bank.active is None
        assert bank.adapters == ["policy"]
        assert not runner.optimizer.state
        assert all(p.grad is None and p.requires_grad for p in bank.parameters("policy").values())

    def test_it_had_moved(self, make_config: MakeConfig) -> None:
        runner = Runner(make_config(ppo=USUAL))
        assert runner.data is not None
        bank, step = runner.bank, runner.algorithm
        rollout = step.sample(runner.data.batch(0, 2, 0), 0)
        start = step.policy_output(rollout, step.budget.train).logprobs
        before = {name: p.detach().clone() for name, p in bank.parameters("policy").items()}
        with moved_policy(step, rollout, start, runner.optimizer, seed=0, coarse=False) as first:
            for name, p in bank.parameters("policy").items():
                assert torch.equal(p, before[name]) == ("lora_A" in name)  # B is zero: A has no gradient yet
            assert first.scale >= 1
        assert all(torch.equal(p, before[name]) for name, p in bank.parameters("policy").items())

    def test_a_run_after_it_is_the_run_without_it(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def trained() -> dict[str, Tensor]:
            runner = Runner(make_config())
            runner.train()
            return {name: p.detach().clone() for name, p in runner.bank.parameters("policy").items()}

        with_it = trained()
        monkeypatch.setattr("marl_core.safety.preflight._moved", lambda *_: [])
        without = trained()
        assert all(torch.equal(with_it[name], without[name]) for name in without)


@pytest.mark.parametrize(
    "changes",
    [
        {"value": "own"},
        {"value": "none", "ppo": {"advantage": "grpo", "samples_per_prompt": 2}},
        {"model": {"gradient_checkpointing": True}},
        {"ppo": {"microbatch": 1}},
        {"policy": {"dropout": 0.2}},
        {"sampling": {"temperature": 0.01, "max_new_tokens": 3, "min_new_tokens": 2}},
        {"speed": {"merge_for_sampling": True}},
        {"speed": {"decode": "transformers"}},
        {"speed": {"pack": False}},
        {"policy": {"lora": {"use_rslora": True}}},
        {"policy": {"targets": ["q_proj"], "lora": {"layers_to_transform": [1]}}},
    ],
    ids=str,
)
def test_what_is_right_passes(make_config: MakeConfig, changes: dict[str, Any]) -> None:
    """Whatever a run may be, with the checks that apply to it."""
    found = check(Runner(make_config(**{**changes, "ppo": {**USUAL, **changes.get("ppo", {})}})))
    assert {"ratio", "gradient", "step", "batch", "file"} <= set(found)
    assert ("sampled" in found) == (changes.get("speed", {}).get("decode") != "transformers")
    one_row = "microbatch" in changes.get("ppo", {})
    assert ("packed" in found) == (changes.get("speed", {}).get("pack", True) and not one_row)
    for name in ("gradient", "batch", "file"):
        assert found[name].ok, found[name]
