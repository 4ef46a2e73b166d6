"""Adapters on experts that are one tensor for all (`target_parameters`), and the counters that guard the base."""

from __future__ import annotations

from types import MethodType
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as kept_counter


def leave_counters(model: nn.Module) -> None:
    """Let no pass through PEFT's wrappers of single weights count as a change of these weights.

    Such a wrapper puts W + s B A in the weight's place with torch's parametrization, which sets the weight's tensor to itself
    in each pass: the numbers stay, the counter of changes in place doesn't.
    """
    for module in model.modules():
        if isinstance(module, ParamWrapper) and "forward" not in vars(module):
            vars(module)["forward"] = MethodType(_uncounted, module)


def _uncounted(self: Any, *args: Any, **options: Any) -> Any:
    with kept_counter(self.get_param()):
        return ParamWrapper.forward(self, *args, **options)
