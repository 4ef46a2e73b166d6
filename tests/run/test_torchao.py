"""torchao's int8 base: frozen, exact in its own way, with right gradients, also on a merged base."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from marl_core import AdapterBank, Plan, PluginError, RunConfig, Runner, response_logprobs
from marl_core.testing import fake_rollout
from marl_plugins.quantization_torchao import TorchaoInt8

MakeConfig = Callable[..., RunConfig]


def weights(runner: Runner) -> dict[str, torch.Tensor]:
    """The base's weights as they are used, int8 ones unpacked."""
    named = runner.bank.base.named_parameters()
    kept = {name: p.detach() for name, p in named if "lora_" not in name}
    return {
        name: (t.dequantize() if hasattr(t, "dequantize") and hasattr(t, "qdata") else t).clone()
        for name, t in kept.items()
    }


@pytest.mark.parametrize("reference", ["disabled-adapter", "merged-base", "ema-adapter"])
def test_a_run(
    make_config: MakeConfig, wide_folder: str, write_sft_adapter: Any, tmp_path: Any, reference: str
) -> None:
    use: dict[str, Any] = {"use": reference}
    if reference == "merged-base":
        use["adapter"] = write_sft_adapter(wide_folder, tmp_path / "sft")
    runner = Runner(make_config(model={"path": wide_folder}, quantization="torchao-int8", reference=use))
    packed = [name for name, p in runner.bank.base.named_parameters() if hasattr(p, "qdata")]
    assert len(packed) == 14
    before = weights(runner)
    steps = list(runner.steps())
    assert runner.preflight is not None
    details = {check.name: check.detail for check in runner.preflight.checks}
    assert "step-0 KL is bitwise 0" in details["reference"]
    reached = "it reaches 28 of 28 tensors that learn"
    assert details["gradient"] == f"gradient before and after a rollout: bitwise the same; {reached}"
    assert steps[0]["policy/first_ratio_error"] == 0.0
    assert steps[0]["policy/grad_norm"] > 0
    after = weights(runner)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_a_policy_on_a_few_layers(make_config: MakeConfig, wide_folder: str) -> None:
    """Few enough that sampling would fold the policy into copies of plain weights; packed ones can't be."""
    policy = {"r": 4, "alpha": 8, "targets": ["k_proj"]}
    steps = list(Runner(make_config(model={"path": wide_folder}, quantization="torchao-int8", policy=policy)).steps())
    assert steps[0]["policy/first_ratio_error"] < 1e-4


@pytest.mark.parametrize("group_size", [None, 32])
def test_it_rounds_to_a_127th_of_the_largest_of_its_group(wide_folder: str, group_size: int | None) -> None:
    quantization = TorchaoInt8(group_size=group_size).marl_quantization()
    bank = AdapterBank.from_pretrained(wide_folder, device="cpu", quantization=quantization)
    plain = AdapterBank.from_pretrained(wide_folder, device="cpu")
    name = "model.layers.0.mlp.down_proj.weight"
    mine: Any = dict(bank.base.named_parameters())[name]
    theirs = dict(plain.base.named_parameters())[name].detach()
    grouped = theirs.view(theirs.shape[0], -1, group_size or theirs.shape[1])
    step = grouped.abs().amax(dim=2, keepdim=True) / 127
    error = (mine.dequantize() - theirs).abs().view(grouped.shape)
    assert bool((error <= step * 0.51).all())
    assert float(error.max()) > 0
    rollout = fake_rollout(tokenizer=bank.tokenizer)
    assert not torch.equal(response_logprobs(bank, rollout), response_logprobs(plain, rollout))


def test_a_row_does_not_depend_on_its_batch(wide_folder: str) -> None:
    bank = AdapterBank.from_pretrained(wide_folder, device="cpu", quantization=TorchaoInt8().marl_quantization())
    rollout = fake_rollout(tokenizer=bank.tokenizer)
    gap = (response_logprobs(bank, rollout, batch=1) - response_logprobs(bank, rollout, batch=8)).abs().max()
    assert float(gap) < 1e-4


def test_without_torchao_the_extra_is_named(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marl_plugins.quantization_torchao.find_spec", lambda name: None)
    findings = Plan.of(make_config(quantization="torchao-int8")).check()
    assert any(
        "torchao-int8 needs torchao; install it with: pip install 'marl-core[torchao]'" in line for line in findings
    )


def test_a_broken_torchao_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    logging.getLogger("torchao").setLevel(
        logging.NOTSET
    )  # an earlier test may have run the command line, which hushes it
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(PluginError, match=r"torchao can't be used .*or choose another quantization"):
        TorchaoInt8().marl_quantization()
    assert logging.getLogger("torchao").level != logging.ERROR
