"""Small models with adapters as PEFT alone makes them, and the sentence that a mended fault ends with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from marl_core.testing import tiny_model


@pytest.fixture
def still() -> Callable[[bool, str], None]:
    """Assert that a fault is still there; when it is not, its guard may go."""

    def check(there: bool, guard: str) -> None:
        assert there, f"fixed upstream: remove the guard in {guard}"

    return check


@pytest.fixture
def adapted() -> Callable[..., Any]:
    """The tiny model with LoRA adapters of the given names, none of them zero unless asked."""
    from peft import LoraConfig, get_peft_model

    def make(*names: str, noise: float = 0.1, model: Any = None, **options: Any) -> Any:
        torch.manual_seed(3)
        config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
        found: Any = get_peft_model(model or tiny_model(), LoraConfig(**config), adapter_name=names[0])
        for name in names[1:]:
            found.add_adapter(name, LoraConfig(**config))
        with torch.no_grad():
            for name, parameter in found.named_parameters():
                if "lora_B" in name and noise:
                    parameter.copy_(torch.randn(parameter.shape) * noise)
        return found.eval()

    return make
