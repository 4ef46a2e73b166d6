"""Faults of bitsandbytes on CPUs: each test reproduces one, and fails when it is mended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16

Still = Callable[[bool, str], None]
Adapted = Callable[..., Any]
IDS = torch.tensor([[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25], [7, 9, 7, 9, 7, 9]])

pytestmark = pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt", "ignore:bitsandbytes..gemv_4bit", "ignore:Merge lora module"
)


def load(folder: str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), device_map="cpu", dtype=torch.float32
    )
    return model.eval()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def gradient(model: Any) -> torch.Tensor:
    model.train()
    model.zero_grad()
    (-model(input_ids=IDS).logits.log_softmax(-1)[..., 5].mean()).backward()
    named = [p for name, p in model.named_parameters() if "lora_" in name]
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().clone() for p in named])


def test_4_bit_gradients_are_wrong_after_a_rollout(still: Still, adapted: Adapted, wide_folder: str) -> None:
    """The first pass without gradient repacks the weights for a kernel that has no right backward."""
    if not has_avx512bf16():  # type: ignore[no-untyped-call]  # bitsandbytes is untyped
        pytest.skip("this CPU has no AVX512-BF16, so nothing is repacked")
    model = adapted("policy", model=load(wide_folder, load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32))
    before = gradient(model)
    logits(model.eval(), IDS)
    after = gradient(model)
    still(float((after - before).norm() / before.norm()) > 0.01, "plugins/marl_plugins/quantization.py")


def test_int8_rows_depend_on_each_other(still: Still, wide_folder: str) -> None:
    """With bitsandbytes' own threshold, 6: outliers of one row decide which columns of all rows are exact."""
    model = load(wide_folder, load_in_8bit=True, llm_int8_threshold=6.0)
    gap = (logits(model, IDS)[:1] - logits(model, IDS[:1])).abs().max()
    exact = load(wide_folder, load_in_8bit=True, llm_int8_threshold=0.0)
    assert float((logits(exact, IDS)[:1] - logits(exact, IDS[:1])).abs().max()) < 1e-3 * float(gap)
    still(float(gap) > 0.01, "plugins/marl_plugins/quantization.py")


def test_int8_trains_and_evaluates_by_different_kernels(still: Still, adapted: Adapted, wide_folder: str) -> None:
    """The same weights and rows, dropout 0: train mode and eval mode give other numbers."""
    model = adapted("policy", model=load(wide_folder, load_in_8bit=True, llm_int8_threshold=0.0))
    gap = float((logits(model.train(), IDS) - logits(model.eval(), IDS)).abs().max())
    still(gap > 0.01, "marl_core/bank/trunk.py")
