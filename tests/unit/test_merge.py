"""Merging: the merged base is the base with its adapter, in full precision only, and nothing is overwritten."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from marl_core import AdapterBank, ConfigError, DataError, merge_into
from marl_core.bank.base import load_base
from marl_core.bank.merge import merge_adapter

IDS = torch.tensor([[36, 224, 74, 82], [37, 68, 71, 5]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


@pytest.fixture
def with_adapter(tiny_folder: str, sft_adapter: str) -> torch.Tensor:
    """Logits of the base seen through its SFT adapter."""
    bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
    bank.load("sft", sft_adapter)
    with bank.using("sft") as model:
        return logits(model)


def test_merged_is_base_with_adapter(tiny_folder: str, sft_adapter: str, with_adapter: torch.Tensor) -> None:
    base = load_base(tiny_folder)
    before = logits(base)
    merged = merge_into(base, sft_adapter)
    torch.testing.assert_close(logits(merged), with_adapter, rtol=0, atol=1e-5)
    assert float((with_adapter - before).abs().max()) > 0.1
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]


def test_half_precision_is_refused(tiny_folder: str, sft_adapter: str) -> None:
    base = load_base(tiny_folder, dtype="bfloat16")
    before = logits(base)
    with pytest.raises(
        ConfigError, match=r"reference.adapter: merging needs the full-precision .* this one is torch.bfloat16"
    ):
        merge_into(base, sft_adapter, "reference.adapter")
    assert torch.equal(logits(base), before)


def test_a_quantized_base_is_refused(sft_adapter: str) -> None:
    base: Any = SimpleNamespace(is_quantized=True, dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"this one is quantized. Merge first, quantize or cast afterwards"):
        merge_into(base, sft_adapter)


def test_a_reward_adapter_is_refused(tiny_folder: str, reward_adapter: str) -> None:
    with pytest.raises(DataError, match="merging it would lose the head"):
        merge_into(load_base(tiny_folder), reward_adapter)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bank_merges_first_and_casts_afterwards(
    tiny_folder: str, sft_adapter: str, with_adapter: torch.Tensor, dtype: str
) -> None:
    bank = AdapterBank.from_pretrained(
        tiny_folder, dtype=dtype, device="cpu", prepare=lambda base: merge_into(base, sft_adapter)
    )
    truth = merge_into(load_base(tiny_folder), sft_adapter).to(getattr(torch, dtype))
    assert torch.equal(logits(bank.base), logits(truth))
    if dtype == "float32":
        torch.testing.assert_close(logits(bank.base), with_adapter, rtol=0, atol=1e-5)


class TestMergeAdapter:
    def test_report_and_model(
        self, tiny_folder: str, sft_adapter: str, tmp_path: Path, with_adapter: torch.Tensor
    ) -> None:
        report = merge_adapter(tiny_folder, sft_adapter, tmp_path / "out" / "merged")
        assert report.out == tmp_path / "out" / "merged"
        assert 0 < report.max_logit_difference < 1e-4
        assert abs(report.mean_kl_nats) < 1e-6
        assert report.seconds > 0
        torch.testing.assert_close(logits(load_base(str(report.out))), with_adapter, rtol=0, atol=1e-5)
        AdapterBank.from_pretrained(str(report.out), device="cpu")  # tokenizer included
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]

    def test_the_loss_of_a_cast_is_measured(self, tiny_folder: str, sft_adapter: str, tmp_path: Path) -> None:
        exact = merge_adapter(tiny_folder, sft_adapter, tmp_path / "exact")
        cast = merge_adapter(tiny_folder, sft_adapter, tmp_path / "cast", dtype="bfloat16")
        assert cast.max_logit_difference > 100 * exact.max_logit_difference
        assert load_base(str(cast.out), dtype="bfloat16").dtype == torch.bfloat16
        # What is reported is what the written model does.
        assert cast.mean_kl_nats > 0

    def test_nothing_is_overwritten(self, tiny_folder: str, sft_adapter: str, tmp_path: Path) -> None:
        (tmp_path / "note.txt").write_text("mine", encoding="utf-8")
        with pytest.raises(DataError, match="exists and isn't empty; give a new folder"):
            merge_adapter(tiny_folder, sft_adapter, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]

    def test_an_empty_folder_may_be_given(self, tiny_folder: str, sft_adapter: str, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        merge_adapter(tiny_folder, sft_adapter, tmp_path / "out")
        assert (tmp_path / "out" / "config.json").is_file()

    def test_a_failure_leaves_nothing(self, tiny_folder: str, reward_adapter: str, tmp_path: Path) -> None:
        with pytest.raises(DataError):
            merge_adapter(tiny_folder, reward_adapter, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
