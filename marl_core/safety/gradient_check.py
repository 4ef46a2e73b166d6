"""Does a gradient survive a rollout, and does it reach what learns? Some quantized kernels lose it after the first pass without one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.trunk import PassOptions
from marl_core.errors import NumericError
from marl_core.ppo.seeds import generator
from marl_core.safety.findings import PreflightCheck

MIN_COSINE = 0.9999
"""Smallest cosine between the gradients before and after a rollout that counts as the same direction."""


def gradient_survives(bank: AdapterBank, policy: str) -> PreflightCheck:
    """The policy's gradient before and after generating; NumericError when they differ.

    Called right after the policy was added, before any other pass: the first pass without gradient does the damage.
    """
    ids = torch.randint(0, bank.trunk.vocabulary, (2, 12), generator=generator("probe")).to(bank.device)
    with bank.trunk.passing(
        PassOptions(pack=False)
    ):  # finding out whether rows can be packed is a pass without gradient
        return _survives(bank, policy, ids)


def _survives(bank: AdapterBank, policy: str, ids: Tensor) -> PreflightCheck:
    before = _gradient(bank, policy, ids)
    with torch.no_grad(), bank.using(policy), bank.trunk.generating() as model:
        model.generate(  # type: ignore[operator]  # transformers types generate loosely
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, min_new_tokens=2, do_sample=False
        )
    return _compare(before, _gradient(bank, policy, ids))


def _gradient(bank: AdapterBank, policy: str, ids: Tensor) -> Tensor:
    """Gradient of a fixed random projection of the hidden states, as one vector. The LM head isn't touched."""
    parameters = list(bank.parameters(policy).values())
    direction = torch.randn(bank.trunk.hidden_size, generator=generator("direction"), dtype=torch.float32).to(
        bank.device
    )
    with bank.using(policy):
        loss = (bank.trunk.hidden(ids, torch.ones_like(ids)).float() @ direction).mean()
        if not loss.requires_grad:
            raise NumericError(
                f"pre-flight: no gradient reaches the policy: {type(bank.base).__name__} computes its layers in a way that keeps "
                "none for them (reversible layers, or a forward without gradient). Use another model."
            )
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten().float() for g, p in zip(grads, parameters, strict=True)]
    )


def _compare(before: Tensor, after: Tensor) -> PreflightCheck:
    norm = float(before.norm())
    if not math.isfinite(norm):
        raise NumericError(
            f"pre-flight: the policy's gradient has norm {norm} before anything was trained: the base holds NaN or infinite weights, "
            "or overflows in this dtype. Check the model folder, or try model.dtype: float32."
        )
    if norm == 0.0:  # an adapter of single tokens has none where those don't stand; the first prompts will tell
        return PreflightCheck("gradient", True, "gradient before and after a rollout: none for tokens drawn at random")
    cosine = float(torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=0))
    error = float((after - before).norm()) / norm
    if not cosine > MIN_COSINE:
        raise NumericError(
            f"pre-flight: the gradient after a rollout is not the gradient before it (cosine {cosine:.4f}, relative error "
            f"{error:.3g}): training would follow a wrong direction. Known cause: 4-bit weights repacked by a CPU kernel "
            "without backward; use the built-in quantization strategies, or quantization: none."
        )
    agreement = "bitwise the same" if error == 0 else f"the same within {error:.1g}"
    return PreflightCheck(
        "gradient",
        True,
        f"gradient before and after a rollout: {agreement}",
        {"cosine": cosine, "relative_error": error},
    )


def reaches(survival: PreflightCheck, gradients: Mapping[str, Tensor]) -> PreflightCheck:
    """The gradient check's whole result: `survival`, and how many of the tensors that learn have a gradient on the first prompts.

    To be asked of a policy that has moved: one part of a fresh adapter has none, while the other is zero. NumericError where none has.
    """
    refuse_no_gradient(gradients)
    norms = torch.stack(torch._foreach_norm(list(gradients.values()))).tolist()
    without = [name for name, norm in zip(gradients, norms, strict=True) if norm == 0.0]
    count = len(gradients) - len(without)
    said = f"{survival.detail}; it reaches {count} of {len(gradients)} tensors that learn"
    if without:
        said += (
            f", none of the others (first: {without[0]}): they stay as they are, unless later prompts reach them. Usual causes: experts or "
            "single tokens that the first prompts don't meet, or layers whose output nobody reads"
        )
    numbers = {**survival.numbers, "share": count / len(gradients)}
    return replace(survival, ok=survival.ok and not without, detail=said, numbers=numbers)


def refuse_no_gradient(gradients: Mapping[str, Tensor]) -> None:
    """NumericError when all are zero, with what may be the cause."""
    if any(bool(gradient.any()) for gradient in gradients.values()):
        return
    raise NumericError(
        "pre-flight: the policy's gradient is 0 on the first prompts, so nothing would learn. Usual causes: the adapter stands on the "
        "output layer, whose own weight marl reads log-probs from; it trains tokens that the prompts don't hold; it acts only after given "
        "tokens; or the base's weights are zero. Name other layers as targets, use another kind of adapter, or check the model folder."
    )
