"""The pre-flight check: what is right passes bitwise, and each thing that would train in silence the wrong way is caught."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16

from marl_core import (
    ConfigError,
    NumericError,
    Quantization,
    ReferenceFunction,
    Rollout,
    RunConfig,
    Runner,
    Strategy,
    View,
    hookimpl,
)
from marl_core.ppo.budget import PassLimits
from marl_core.safety import preflight
from marl_core.safety.findings import PreflightCheck
from marl_core.safety.gradient_check import gradient_survives
from marl_core.testing import tiny_bank
from marl_core.testing.kinds import make_config as make_lora
from marl_plugins.quantization import Bnb4Bit

MakeConfig = Callable[..., RunConfig]
USUAL: dict[str, Any] = {"learning_rate": 1e-4}
"""A rate whose first step is one, on a tiny model."""


class Trap(Strategy):
    """A stranger's reference that says the bare base, whatever the policy starts from, and checks nothing."""

    @hookimpl
    def marl_reference(self) -> View:
        return View(None)


class Elsewhere(Strategy):
    """A stranger's reference that is computed elsewhere: the bare base's log-probs, plus an error."""

    error: float = 0.0

    @hookimpl
    def marl_reference(self, bank: Any) -> ReferenceFunction:
        from marl_core.ppo.scoring import view_output

        def logprobs(rollout: Rollout) -> torch.Tensor:
            return view_output(bank, View(None), rollout, 1.0, PassLimits(8)).logprobs - self.error

        return logprobs


class Packing(Bnb4Bit):
    """4-bit without the setting that keeps CPUs from repacking the weights."""

    @hookimpl
    def marl_quantization(self, compute_dtype: str) -> Quantization:
        right = super().marl_quantization(compute_dtype)
        return Quantization(right.config, bytes_per_weight=right.bytes_per_weight)


def check(config: RunConfig) -> dict[str, PreflightCheck]:
    """Each check of a run by name."""
    runner = Runner(config)
    assert runner.data is not None
    return {found.name: found for found in runner.check_start(runner.data.batch(0, 4, 0)).checks}


def lines(sft: str) -> dict[str, dict[str, Any]]:
    """The right lines of design section 7."""
    return {
        "a new adapter on the base": {"reference": "disabled-adapter"},
        "a new adapter on the merged base": {"reference": {"use": "merged-base", "adapter": sft}},
        "a copy of the SFT adapter": {
            "reference": {"use": "peft-adapter", "adapter": sft},
            "policy": {"start": "continue", "from": sft},
        },
    }


def trap(sft: str, **reference: Any) -> dict[str, Any]:
    return {"reference": {"use": "disabled-adapter", **reference}, "policy": {"start": "continue", "from": sft}}


class TestReference:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize(
        "line", ["a new adapter on the base", "a new adapter on the merged base", "a copy of the SFT adapter"]
    )
    def test_the_right_ones_have_a_step_0_kl_of_bitwise_zero(
        self, make_config: MakeConfig, sft_adapter: str, line: str, dtype: str
    ) -> None:
        found = check(make_config(model={"dtype": dtype}, ppo=USUAL, **lines(sft_adapter)[line]))
        assert found["reference"].ok
        assert found["reference"].numbers == {"kl_nats": 0.0, "max_difference": 0.0, "mean_difference": 0.0}
        assert "step-0 KL is bitwise 0" in found["reference"].detail
        assert found["ratio"].numbers["max_error"] == 0.0
        assert all(one.ok for one in found.values())

    def test_the_classic_trap_is_refused_before_a_weight_is_read(
        self, make_config: MakeConfig, sft_adapter: str
    ) -> None:
        with pytest.raises(
            ConfigError,
            match=r"with adapters off the reference never saw that adapter's training.*peft-adapter, adapter",
        ):
            Runner(make_config(**trap(sft_adapter)))

    def test_the_trap_is_measured_where_a_stranger_says_nothing(
        self, make_config: MakeConfig, sft_adapter: str
    ) -> None:
        config = make_config(policy={"start": "continue", "from": sft_adapter})
        config = config.model_copy(update={"reference": type(config.reference).model_validate({"use": Trap()})})
        with pytest.raises(
            ConfigError,
            match=r"pre-flight: .*Before any update they differ by .* the reference is not the model the policy starts",
        ) as caught:
            check(config)
        assert "set reference.allow_mismatch: true" in str(caught.value)
        assert "(marl_reference of Trap" in str(caught.value)
        assert "would pull towards another model than that" in str(caught.value)
        assert "never saw" not in str(caught.value)
        assert f"Use the frozen adapter {sft_adapter} as reference" in str(caught.value)

    def test_allow_mismatch_passes_and_says_so(self, make_config: MakeConfig, sft_adapter: str) -> None:
        found = check(make_config(**trap(sft_adapter, allow_mismatch=True)))
        assert not found["reference"].ok
        assert "allowed by reference.allow_mismatch" in found["reference"].detail
        assert found["reference"].numbers["mean_difference"] > 0.01

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (
                {"reference": {"use": "peft-adapter", "adapter": "SFT"}},
                "the policy starts as a new adapter on the bare base",
            ),
            (
                {"reference": {"use": "merged-base", "adapter": "SFT"}, "policy": {"start": "continue", "from": "SFT"}},
                "policy and reference differ from the start",
            ),
        ],
    )
    def test_the_other_wrong_lines_are_refused_too(
        self, make_config: MakeConfig, sft_adapter: str, wrong: dict[str, Any], message: str
    ) -> None:
        changes = json.loads(json.dumps(wrong).replace("SFT", sft_adapter))
        with pytest.raises(ConfigError, match=message):
            Runner(make_config(**changes))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("options", [{"init_lora_weights": "orthogonal"}, {"use_dora": True}])
    def test_a_kind_that_starts_as_the_base_to_rounding_passes(
        self, make_config: MakeConfig, options: dict[str, Any], dtype: str
    ) -> None:
        """Orthogonal factors cancel to 8e-7, which isn't bitwise."""
        found = check(make_config(model={"dtype": dtype}, policy={"lora": options}))["reference"]
        assert found.ok
        assert found.numbers["mean_difference"] < preflight.ROUNDED_TOLERANCE[dtype]

    def test_without_a_penalty_nothing_is_compared(self, make_config: MakeConfig) -> None:
        assert "reference" not in check(make_config(ppo={"kl": {"coef": 0.0}}))

    @pytest.mark.parametrize(("error", "right"), [(0.0, True), (1e-4, True), (0.1, False)])
    def test_a_reference_elsewhere_may_round_differently(
        self, make_config: MakeConfig, error: float, right: bool
    ) -> None:
        config = make_config()
        config = config.model_copy(
            update={"reference": type(config.reference).model_validate({"use": Elsewhere(error=error)})}
        )
        if right:
            assert check(config)["reference"].ok
        else:
            with pytest.raises(ConfigError, match=r"Before any update they differ by 0.1 nats per token"):
                check(config)


class TestTrainable:
    def test_counts_by_role(self, make_config: MakeConfig) -> None:
        # r 4 on q (32+32), k and v (32+16), o (32+32), gate and up (32+64), down (64+32), two blocks: 4 * 512 * 2 = 4096; head 32 + 1
        numbers = check(make_config())["trainable"].numbers
        assert numbers == {"policy": 4096.0, "value": 33.0}

    @pytest.mark.parametrize("tamper", ["base learns", "policy frozen", "half precision"])
    def test_tampering_is_caught(self, make_config: MakeConfig, tamper: str) -> None:
        runner = Runner(make_config())
        mine = next(iter(runner.bank.parameters("policy").values()))
        if tamper == "base learns":
            runner.bank.base.get_input_embeddings().weight.requires_grad_(True)
        elif tamper == "policy frozen":
            mine.requires_grad_(False)
        else:
            mine.data = mine.data.to(torch.bfloat16)
        assert runner.data is not None
        with pytest.raises(ConfigError, match=r"the trainable set is not what the roles say; first: \["):
            runner.check_start(runner.data.batch(0, 4, 0))


class TestQuantized:
    @pytest.mark.parametrize("quantization", ["bnb-8bit", "bnb-4bit"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_built_ins_keep_their_gradient(
        self, make_config: MakeConfig, wide_folder: str, quantization: str, dtype: str
    ) -> None:
        found = check(make_config(model={"path": wide_folder, "dtype": dtype}, quantization=quantization))
        assert found["gradient"].numbers["cosine"] > 0.9999
        assert found["reference"].numbers["max_difference"] == 0.0

    @pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit")  # torch 2.13 sees it too, and only warns
    def test_a_gradient_that_a_rollout_spoils_is_caught(self, make_config: MakeConfig, wide_folder: str) -> None:
        """bitsandbytes repacks 4-bit weights at the first pass without gradient, on CPUs with AVX512-BF16."""
        config = make_config(model={"path": wide_folder, "dtype": "bfloat16"})
        config = config.model_copy(
            update={"quantization": type(config.quantization).model_validate({"use": Packing()})}
        )
        if not has_avx512bf16():  # type: ignore[no-untyped-call]  # bitsandbytes is untyped
            pytest.skip("this CPU has no AVX512-BF16, so nothing is repacked")
        with pytest.raises(
            NumericError, match=r"the gradient after a rollout is not the gradient before it.*4-bit weights repacked"
        ):
            Runner(config)

    def test_any_spoiled_gradient_is_caught(self) -> None:
        """The same without that CPU: weights that change at the first pass without gradient."""
        bank = tiny_bank()
        bank.add("policy", make_lora(4, 8, "all-linear", 0.0, {}, bank.linears), seed=0)
        assert gradient_survives(bank, "policy").numbers["relative_error"] == 0.0

        weight = bank.parameters("policy")["model.layers.0.mlp.up_proj.lora_A.policy.weight"]

        def spoil(*_: Any) -> None:
            if not torch.is_grad_enabled():
                weight.mul_(-1.5)

        bank.base.register_forward_pre_hook(spoil)
        with pytest.raises(NumericError, match="the gradient after a rollout is not the gradient before it"):
            gradient_survives(bank, "policy")

    def test_batch_dependence_of_int8_outliers_is_said(self, make_config: MakeConfig, wide_folder: str) -> None:
        found = check(make_config(model={"path": wide_folder}, quantization={"use": "bnb-8bit", "threshold": 6.0}))
        assert not found["batch"].ok
        assert "set quantization.threshold: 0" in found["batch"].detail
        assert check(make_config(model={"path": wide_folder}, quantization="bnb-8bit"))["batch"].ok


def test_the_result_is_in_the_run_folder(make_config: MakeConfig, reward_adapter: str, tmp_path: Path) -> None:
    runner = Runner(
        make_config(run={"folder": str(tmp_path / "run")}, reward={"use": "adapter", "path": reward_adapter}, ppo=USUAL)
    )
    assert not (tmp_path / "run").exists()
    next(runner.steps())
    written = json.loads((tmp_path / "run" / "preflight.json").read_text(encoding="utf-8"))
    assert written["ok"] is True
    assert [one["name"] for one in written["checks"]] == [
        "trainable",
        "reference",
        "ratio",
        "gradient",
        "step",
        "batch",
        "packed",
        "sampled",
        "file",
        "reward adapter reward",
    ]
    assert "trained on these weights" in written["checks"][-1]["detail"]


def test_an_adapter_whose_base_can_not_be_told_is_a_note(
    make_config: MakeConfig, sft_adapter: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sft_adapter, tmp_path / "sft"))
    file = folder / "adapter_config.json"
    written = {**json.loads(file.read_text(encoding="utf-8")), "base_model_name_or_path": "some-owner/some-model"}
    file.write_text(json.dumps(written), encoding="utf-8")
    found = check(
        make_config(
            policy={"start": "continue", "from": str(folder)},
            reference={"use": "peft-adapter", "adapter": str(folder)},
        )
    )
    notes = [one for name, one in found.items() if name.startswith("adapter ")]
    assert notes
    assert all(not one.ok and "'some-owner/some-model' isn't here" in one.detail for one in notes)


def test_it_leaves_everything_as_it_was(make_config: MakeConfig) -> None:
    runner = Runner(make_config())
    weights = {name: tensor.clone() for name, tensor in runner.bank.tensors("policy").items()}
    before = torch.get_rng_state()
    assert runner.data is not None
    runner.check_start(runner.data.batch(0, 4, 0))
    assert torch.equal(torch.get_rng_state(), before)
    assert runner.bank.active is None
    assert runner.bank.adapters == ["policy"]
    assert not runner.optimizer.state
    assert all(torch.equal(tensor, weights[name]) for name, tensor in runner.bank.tensors("policy").items())
    assert all(parameter.grad is None for parameter in runner.bank.all_parameters().values())
