"""The optimizer's first step, taken for a look and taken back.

A fresh adapter's update is zero, so whatever is wrong with it changes nothing yet. The policy is moved as the first step would move
it, looked at, and gets its bytes back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marl_core.bank.views import View
from marl_core.errors import NumericError
from marl_core.ppo.objectives import masked_mean, masked_sum
from marl_core.ppo.scoring import forward, pieces, view_output
from marl_core.ppo.seeds import generator
from marl_core.ppo.step import Step
from marl_core.ppo.types import Rollout
from marl_core.safety.findings import PreflightCheck
from marl_core.safety.gradient_check import refuse_no_gradient

LARGE_STEP, SMALL_STEP, USUAL_STEP = 0.5, 1e-5, 1e-2
"""Mean |change of log-prob| in nats per token. A LoRA r 16 alpha 32 on a 135M model moves by 0.06 to 0.2 at 3e-4, where it trains well,
and by a thirtieth at 1e-5. Above the first number one step leaves PPO's clip range of 0.2 for most tokens; below the second it changes
nothing that a run of a thousand steps would show; the third is a step to begin with."""
LEAST_MOVE, MOST_MOVE = 0.1, 1.0
"""Nats per token that the policy is moved by before it is looked at: far above what half precision rounds (0.02 to 0.05), and not so
far that its log-probs say nothing of the policy any more."""
MOST_SCALE, LEAST_SCALE = 1e8, 1e-18
"""Most steps that are taken at once to get there, and the smallest part of one, where a whole one spoils the policy."""
ROUNDED_CHANGE = 1e-4
"""Change in nats per token from which a pass in float32 tells it to a percent or so."""


@dataclass(frozen=True, slots=True)
class FirstStep:
    """How far one first step moves the policy, and how many such steps the moved policy is away."""

    nats: float
    """Mean |change of log-prob| of one step at the run's own rates, in nats per token."""
    scale: float
    """What the step is multiplied by while the moved policy is looked at."""
    moved: float
    """Mean |change of log-prob| of the moved policy. Where a whole step spoils the policy this tells more of a smaller one than `nats`."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What a pass that trains gave: log-probs [B, T] float32, and a gradient for each tensor that learns, zero where none came."""

    logprobs: Tensor
    gradients: dict[str, Tensor]


def training_pass(step: Step, rollout: Rollout, seed: int) -> Trained:
    """Forward and backward through the policy in the very pieces that an update takes; no `.grad` is touched.

    The loss is a policy gradient whose advantages are +1 or -1 at random for each token, by `seed`: unlike the mean log-prob it has a
    direction for a policy that is sure of all its tokens, too. NumericError when a gradient isn't finite.
    """
    bank, limits, parameters = step.bank, step.budget.train, step.bank.parameters(step.roles.trained.policy)
    tensors, total = list(parameters.values()), float(rollout.mask.sum())
    signs = torch.randint(0, 2, rollout.mask.shape, generator=generator("preflight advantages", seed)) * 2.0 - 1.0
    sums, logprobs, done = [torch.zeros_like(p, dtype=torch.float32) for p in tensors], [], 0
    with torch.enable_grad(), bank.using(step.roles.trained.policy, train=True, options=limits.options):
        for piece in pieces(rollout, limits):
            found = forward(bank, piece, step.temperature).logprobs
            advantages = signs[done : done + len(piece)].to(found.device)
            done += len(piece)
            logprobs.append(found.detach())
            if found.requires_grad:
                loss = -masked_sum(advantages * found, piece.mask) / total
                for mine, gradient in zip(sums, torch.autograd.grad(loss, tensors, allow_unused=True), strict=True):
                    if gradient is not None:
                        mine += gradient
    if not all(bool(gradient.isfinite().all()) for gradient in sums):
        raise NumericError(
            "pre-flight: the policy's gradient on the first prompts isn't finite: the base holds NaN, or overflows in this dtype. Check "
            "the model folder, or try model.dtype: float32."
        )
    return Trained(torch.cat(logprobs), dict(zip(parameters, sums, strict=True)))


@contextmanager
def moved_policy(
    step: Step, rollout: Rollout, start: Tensor, optimizer: torch.optim.Optimizer, *, seed: int, coarse: bool
) -> Iterator[FirstStep]:
    """A block in which the policy is where AdamW's first step takes it, or as many of them as show above rounding.

    Afterwards its weights have their bytes back, however the block ends; the optimizer is only asked for its rates, and its state isn't
    touched. start [B, T]: the policy's log-probs of the rollout as it is. `coarse`: passes are rounded to more than float32.
    Every rank does the same. NumericError where no tensor has a gradient.
    """
    parameters = step.bank.parameters(step.roles.trained.policy)
    gradients = training_pass(step, rollout, seed).gradients
    refuse_no_gradient(gradients)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    move = first_move(optimizer, parameters, gradients, step.ppo.max_grad_norm)
    del gradients

    def change(scale: float) -> float:
        _write(parameters, {name: tensor + scale * move[name] for name, tensor in before.items()})
        policy = View(step.roles.trained.policy)
        moved = view_output(step.bank, policy, rollout, step.temperature, step.budget.train).logprobs
        mean = float(masked_mean((moved - start).abs(), rollout.mask).nan_to_num(math.inf, math.inf))
        return step.ranks.all_reduce_max([mean])[0]  # ranks that round otherwise must take equally many passes

    try:
        yield _far_enough(change, coarse)
    finally:
        _write(parameters, before)


@torch.no_grad()
def _write(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _far_enough(change: Callable[[float], float], coarse: bool) -> FirstStep:
    """Move by one step, then by as many as make a change between LEAST_MOVE and MOST_MOVE; `change` moves and measures."""
    scale, found = 1.0, change(1.0)
    told = math.isfinite(found) and found >= (LEAST_MOVE if coarse else ROUNDED_CHANGE)
    nats = found
    while found < LEAST_MOVE and scale < MOST_SCALE:
        missing = math.ceil(math.log10(LEAST_MOVE / max(found, 1e-4 * LEAST_MOVE)))
        scale *= 10.0 ** max(1, missing)
        found = change(scale)
    while found > MOST_MOVE and scale > LEAST_SCALE:
        scale /= 3.0 if math.isfinite(found) else 1e3
        found = change(scale)
    return FirstStep(nats if told else found / scale, scale, found)


def first_move(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    gradients: dict[str, Tensor],
    max_grad_norm: float | None,
) -> dict[str, Tensor]:
    """What AdamW's first step adds to each tensor, at its group's full rate: warm-up begins with a part of it.

    Its moments are the gradient itself then, so that is -rate * (g / (|g| + eps) + weight_decay * p), g being clipped as an update
    clips it. Zero for what the optimizer doesn't hold.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    norm = float(torch.stack(torch._foreach_norm(list(gradients.values()))).norm())
    clip = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
    moves = {}
    for name, p in parameters.items():
        group = groups.get(id(p))
        if group is None:
            moves[name] = torch.zeros_like(p)
            continue
        rate, gradient = group.get("initial_lr", group["lr"]), clip * gradients[name]
        direction = gradient / (gradient.abs() + group["eps"]) + group["weight_decay"] * p.detach()
        moves[name] = (-rate * direction).to(p.dtype)
    return moves


def step_check(first: FirstStep, rate: float) -> PreflightCheck:
    """How far one step at `rate` moves the policy: always said, and not well when that is far too much or next to nothing."""
    said = f"one step at {rate:.3g} moves the policy by {first.nats:.2g} nats a token"
    ok = SMALL_STEP <= first.nats <= LARGE_STEP
    wanted = LARGE_STEP / 5 if first.nats > LARGE_STEP else USUAL_STEP
    better = rate * first.scale * wanted / max(first.moved, 1e-12)
    if first.nats > LARGE_STEP:
        said += (
            ", a step far too large: most ratios leave PPO's clip range with the first one, which may spoil the policy. Lower "
            f"ppo.learning_rate, to about {better:.0e}"
        )
    elif not ok:
        said += (
            ", next to nothing: in a usual run it would hardly learn. Such an adapter wants a higher ppo.learning_rate, about "
            f"{better:.0e}"
        )
    return PreflightCheck("step", ok, said, {"nats": first.nats, "rate": rate, "scale": first.scale})
