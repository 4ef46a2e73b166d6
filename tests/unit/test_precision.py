"""Float32 products that torch was told to round more, as TF32 on a GPU does: no model is refused for it, and nothing calls itself exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from marl_core import Runner
from marl_core.bank.measure import float32_products
from marl_core.errors import NumericError
from marl_core.testing import tiny_bank

CPU = torch.device("cpu")
MakeConfig = Callable[..., Any]


def rounded_to(bits: int) -> Callable[[Tensor], Tensor]:
    """float32 numbers with so many bits behind the first, as a GPU takes them in (TF32: 10)."""

    def cut(numbers: Tensor) -> Tensor:
        if numbers.dtype != torch.float32:
            return numbers
        scale = torch.exp2(torch.floor(torch.log2(numbers.detach().abs().clamp_min(1e-30))) - bits)
        return numbers + ((numbers / scale).round() * scale - numbers).detach()

    return cut


def as_tf32(bits: int = 10) -> Callable[..., Tensor]:
    """torch's own linear layer as a GPU may compute it: factors are cut, but for products of so few rows that another kernel takes them."""
    cut, linear = rounded_to(bits), torch.nn.functional.linear

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        few = x.numel() // x.shape[-1] <= 8
        return linear(x, weight, bias) if few else linear(cut(x), cut(weight), bias)

    return product


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Linear layers as TF32 computes them."""
    monkeypatch.setattr(torch.nn.functional, "linear", as_tf32(getattr(request, "param", 10)))


def test_float32_products_are_float32s() -> None:
    assert float32_products(CPU) == torch.float32
    assert tiny_bank().trunk.precision == "float32"


@pytest.mark.parametrize(
    ("coarse", "dtype"), [(10, torch.float16), (7, torch.bfloat16)], indirect=["coarse"], ids=["TF32", "bfloat16"]
)
@pytest.mark.usefixtures("coarse")
def test_coarser_ones_are_seen(dtype: torch.dtype) -> None:
    assert float32_products(CPU) == dtype


@pytest.mark.usefixtures("coarse")
def test_a_float32_model_is_loaded_and_trained_all_the_same(make_config: MakeConfig) -> None:
    """Taken for float32 it is refused: rows alone and in a batch differ by more than float32 rounds."""
    runner = Runner(make_config(ppo={"epochs": 1}))
    assert runner.bank.trunk.packs
    stats = [step.metrics for step in runner.steps()]
    assert len(stats) == 2
    assert all(step["policy/first_ratio_error"] < 0.35 for step in stats)


def test_a_half_precision_run_is_one_whatever_its_first_weight_is() -> None:
    """transformers keeps some modules in float32, and a model's dtype is that of its first weight."""
    trunk = tiny_bank().trunk
    assert [trunk.precision_of(dtype) for dtype in ("float32", "bfloat16", "float16")] == [
        "float32",
        "bfloat16",
        "float16",
    ]


@pytest.mark.usefixtures("coarse")
def test_what_sampling_saw_is_not_taken_for_exact(make_config: MakeConfig) -> None:
    from marl_core.ppo.types import Prompts

    for setting in (True, None):
        runner = Runner(make_config(speed={"capture": setting}))
        assert runner.generate(Prompts.of([[5, 6], [7, 8, 9]], 0)).behavior is None


def test_it_is_looked_at_when_it_matters(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting can be changed while a Runner lives."""
    from marl_core.ppo.types import Prompts

    runner, prompts = Runner(make_config()), Prompts.of([[5, 6], [7, 8, 9]], 0)
    assert runner.generate(prompts).behavior is not None
    monkeypatch.setattr(torch.nn.functional, "linear", as_tf32())
    assert runner.generate(prompts).behavior is None


def test_rows_that_see_each_other_are_still_refused(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 as it is: more room for TF32 is none for a fault."""
    from marl_core.bank.trunk import Trunk

    runner = Runner(make_config())
    hidden = Trunk.hidden

    def leaking(self: Trunk, ids: Tensor, mask: Tensor) -> Tensor:
        return hidden(self, ids, mask) * (1 + 0.1 * len(ids))

    monkeypatch.setattr(Trunk, "hidden", leaking)
    with pytest.raises(NumericError, match="rows see each other"):
        runner.prepare()
