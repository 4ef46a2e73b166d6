"""Activation recomputation of the cheap pieces between two products: backward computes them again instead of keeping what they give.

A frozen trunk needs little for its backward: of a gated product act(gate) * up the two factors, of an activation its input,
of an adapter on a half precision base the half precision input. Autograd would keep the activation too, every step of a
formula, and each adapter's own float32 copy of its input. What is computed again is the very piece that ran forward, so
gradients are bitwise those of the plain modules. A piece that isn't recognized stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import activations
from transformers.pytorch_utils import Conv1D

SPELLED_OUT_ACTIVATIONS = tuple(
    getattr(activations, name)
    for name in ("NewGELUActivation", "FastGELUActivation", "QuickGELUActivation", "AccurateGELUActivation")
    if hasattr(activations, name)
)
"""Activations that transformers spells out in several operations, each of which keeps a tensor."""


class _Recomputed(torch.autograd.Function):
    """function(*inputs) -> one tensor; backward keeps the inputs and runs the function again."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [saved.detach().requires_grad_(need) for saved, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            out = ctx.function(*inputs)
        gradients = iter(torch.autograd.grad(out, [tensor for tensor in inputs if tensor.requires_grad], grads))
        return None, *(next(gradients) if need else None for need in needed)


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), of which backward keeps the inputs alone; `function` must be pure and cheap.

    A compiler decides that for itself.
    """
    if (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or not any(tensor.requires_grad for tensor in inputs)
    ):
        return function(*inputs)
    result: Any = _Recomputed.apply
    out: Tensor = result(function, *inputs)
    return out


def patch_for_recompute(model: nn.Module) -> int:
    """Give the modules that are recognized a forward that recomputes in backward; how many had none before and have now."""
    patched = 0
    for module in model.modules():
        forward = _recomputing_forward(module)
        if forward is not None and "forward" not in vars(module):
            vars(module)["forward"] = MethodType(forward, module)
            patched += 1
    return patched


def unpatch(model: nn.Module) -> None:
    """Take those forwards away again: every module computes as its class does."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) in RECOMPUTING_FORWARDS:
            del vars(module)["forward"]


def _recomputing_forward(module: nn.Module) -> Callable[..., Tensor] | None:
    if type(module) in SPELLED_OUT_ACTIVATIONS:
        return _activation
    if type(module) is LoraLinear and type(module.base_layer) in (nn.Linear, Conv1D):
        return _adapted
    return _gated_product if _is_gated(module) else None


def _is_gated(module: nn.Module) -> bool:
    """Whether the module's class computes down(act(gate(x)) * up(x)) and nothing else: tried on stand-ins for its layers."""
    if not all(
        isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")
    ):
        return False
    stand_in = SimpleNamespace(gate_proj=torch.sin, up_proj=torch.cos, down_proj=torch.exp, act_fn=torch.tanh)
    x = torch.linspace(-2.0, 2.0, 24).reshape(1, 4, 6)
    try:
        y = type(module).forward(stand_in, x)
    except Exception:  # a form of another kind looks for things that stand-ins lack
        return False
    return isinstance(y, Tensor) and torch.equal(y, torch.exp(torch.tanh(torch.sin(x)) * torch.cos(x)))


def _gated_product(self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    product = recomputed(lambda gate, up: self.act_fn(gate) * up, gate, up)
    down: Tensor = self.down_proj(product)
    return down


def _activation(self: Any, x: Tensor) -> Tensor:
    plain = MethodType(type(self).forward, self)
    return recomputed(plain, x)


def _adapted(self: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    """PEFT's own sum, W x + s B A x, where its input would be cast: the cast is made again."""
    name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
    if args or options or not _casts(self, name, x):
        plain: Tensor = LoraLinear.forward(self, x, *args, **options)
        return plain
    result, scaling = self.base_layer(x), self.scaling[name]

    def delta(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        added: Tensor = nn.functional.linear(nn.functional.linear(x.to(a.dtype), a), b) * scaling
        return added

    summed: Tensor = result + recomputed(delta, x, self.lora_A[name].weight, self.lora_B[name].weight)
    return summed.to(result.dtype)


def _casts(layer: Any, name: str | None, x: Tensor) -> bool:
    """Whether this is a plain adapter without dropout, whose weights are of another dtype than its input."""
    return (
        name is not None
        and not layer.disable_adapters
        and not layer.merged
        and name in layer.lora_A
        and name not in layer.lora_variant
        and layer.lora_B[name].bias is None
        and not (layer.lora_dropout[name].training and getattr(layer.lora_dropout[name], "p", 0.0))
        and x.dtype != layer.lora_A[name].weight.dtype
    )


RECOMPUTING_FORWARDS = (_gated_product, _activation, _adapted)
"""The forwards that `patch_for_recompute` gives."""
