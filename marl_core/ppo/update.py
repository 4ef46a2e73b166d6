"""Epochs, minibatches and optimizer steps -> UpdateStats.

The first epoch goes through the rollout in order, in the very pieces that were scored: its first minibatch has ratio
one exactly. Later epochs shuffle.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.heads import apply_head
from marl_core.config.run_config import PPOSection
from marl_core.errors import NumericError
from marl_core.ppo.budget import PassLimits
from marl_core.ppo.objectives import aggregate, kl_estimate, masked_mean, masked_sum, policy_loss, value_loss
from marl_core.ppo.policy_output import PolicyOutput
from marl_core.ppo.progress import advance
from marl_core.ppo.ranks import Ranks
from marl_core.ppo.roles import TrainableRoles
from marl_core.ppo.scoring import blocks, forward, response_hidden
from marl_core.ppo.types import Advantages, Rollout, ScoredRollout, UpdateStats


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """What an update learns from, row by row."""

    scored: ScoredRollout
    advantages: Advantages

    def __len__(self) -> int:
        return len(self.scored.rollout)

    @property
    def rollout(self) -> Rollout:
        """The responses."""
        return self.scored.rollout

    @property
    def mask(self) -> Tensor:
        """Response tokens that count, [B, T] bool."""
        return self.scored.rollout.mask

    def select(self, rows: Tensor | slice) -> TrainingBatch:
        """Some of the rows."""
        return TrainingBatch(self.scored.select(rows), self.advantages.select(rows))


class MetricAccumulator:
    """Weighted means, extremes and first values of an update's numbers."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._weights: dict[str, float] = defaultdict(float)
        self.ratio_min, self.ratio_max = math.inf, -math.inf
        self.first_ratio_error: float | None = None

    def add(self, weight: float, **values: float) -> None:
        """Add values, each a mean over `weight` tokens or optimizer steps."""
        for name, value in values.items():
            self._sums[name] += value * weight
            self._weights[name] += weight

    def all_reduce(self, ranks: Ranks) -> None:
        """Merge with what the other ranks have added."""
        names = sorted(self._sums)
        sums = ranks.all_reduce_sum([*(self._sums[name] for name in names), *(self._weights[name] for name in names)])
        self._sums.update(zip(names, sums[: len(names)], strict=True))
        self._weights.update(zip(names, sums[len(names) :], strict=True))
        low, self.ratio_max, error = ranks.all_reduce_max(
            [-self.ratio_min, self.ratio_max, self.first_ratio_error or 0.0]
        )
        self.ratio_min, self.first_ratio_error = -low, error

    def mean(self, name: str) -> float:
        """Weighted mean; 0 if nothing was added."""
        return self._sums[name] / self._weights[name] if self._weights[name] else 0.0


@dataclass(frozen=True, slots=True)
class Update:
    """One update of policy and value: how its losses are made, which weights it moves, and what it has measured so far."""

    bank: AdapterBank
    trained: TrainableRoles
    ppo: PPOSection
    temperature: float
    limits: PassLimits
    """Of each pass forward and backward."""
    ranks: Ranks
    optimizer: torch.optim.Optimizer
    kl_coef: float
    metrics: MetricAccumulator = field(default_factory=MetricAccumulator)

    def run(self, batch: TrainingBatch, generator: torch.Generator) -> UpdateStats:
        """`ppo.epochs` over the batch, one optimizer step a minibatch; each minibatch's rows are shared out over the ranks.

        NumericError, with the minibatch's rows, when a loss or gradient norm isn't finite.
        """
        steps, stopped = 0, False
        roles = self.trained.parameters(self.bank)
        self.optimizer.zero_grad(set_to_none=True)  # whatever an update that failed left behind
        total = self.ppo.epochs * math.ceil(len(batch) / self.ppo.minibatch)
        advance(0, total)
        for epoch in range(self.ppo.epochs):
            for rows in minibatches(len(batch), self.ppo.minibatch, None if epoch == 0 else generator):
                with _rows_named(rows, epoch):
                    approx_kl = self._minibatch(batch.select(rows))
                    if self.ppo.max_kl is not None and approx_kl > self.ppo.max_kl:
                        stopped = True
                        break
                    self._optimizer_step(roles)
                steps += 1
                advance(steps, total)
            if stopped:
                break
        self.optimizer.zero_grad(set_to_none=True)
        self.metrics.all_reduce(self.ranks)
        return self._stats(steps, stopped)

    def _minibatch(self, batch: TrainingBatch) -> float:
        """Forward and backward of this rank's rows of one minibatch, a microbatch at a time; the minibatch's approx_kl."""
        mask, metrics = batch.mask, self.metrics
        total = float(mask.sum()) if self.ppo.aggregation == "token" else float(len(mask))
        approx_kl = 0.0
        rank_rows = self.ranks.shard(torch.arange(len(mask)))
        lengths = batch.rollout.sequence_mask.sum(dim=1)[rank_rows].tolist()
        for rows in blocks(lengths, self.limits.rows, self.limits.tokens):
            piece = batch.select(rank_rows[rows])
            output = self._policy(piece, total)
            if self.trained.value_adapter is not None and self.trained.value_head is not None:
                self._own_value(piece, self.trained.value_adapter, self.trained.value_head, total)
            log_ratio = output.logprobs.detach() - piece.scored.logprobs
            approx_kl += float(masked_sum(log_ratio.square() / 2, piece.mask) / mask.sum())
        if metrics.first_ratio_error is None:
            metrics.first_ratio_error = max(abs(metrics.ratio_min - 1), abs(metrics.ratio_max - 1))
        return self.ranks.all_reduce_sum([approx_kl])[0]

    def _policy(self, piece: TrainingBatch, total: float) -> PolicyOutput:
        """Forward and backward through the policy, and its value head if it has one: one block, see AdapterBank."""
        with self.bank.using(self.trained.policy, train=True, options=self.limits.options):
            output = forward(
                self.bank,
                piece.rollout,
                self.temperature,
                value_head=self.trained.policy_head,
                entropy=self.ppo.entropy_coef > 0,
            )
            loss = self._policy_loss(output, piece, total)
            if output.values is not None:
                loss = loss + self.ppo.value_coef * self._value_loss(output.values, piece, total)
            _backward(loss)
        return output

    def _own_value(self, piece: TrainingBatch, adapter: str, head: str, total: float) -> None:
        """Forward and backward through a value adapter of its own."""
        bank = self.trained.value_home(self.bank)
        with bank.using(adapter, train=True, options=self.limits.options):
            values = apply_head(bank.heads[head], response_hidden(bank, piece.rollout))
            _backward(self._value_loss(values, piece, total))

    def _policy_loss(self, output: PolicyOutput, piece: TrainingBatch, total: float) -> Tensor:
        ppo, scored, mask = self.ppo, piece.scored, piece.mask
        losses, clipped = policy_loss(
            output.logprobs,
            scored.logprobs,
            piece.advantages.advantages,
            mask,
            ppo.clip.low,
            ppo.clip.high,
            ppo.dual_clip,
        )
        loss = aggregate(losses, mask, ppo.aggregation, total)
        if ppo.kl.into == "loss" and self.kl_coef > 0 and scored.ref_logprobs is not None:
            kl = kl_estimate(output.logprobs, scored.ref_logprobs, ppo.kl.estimator)
            loss = loss + self.kl_coef * aggregate(kl, mask, ppo.aggregation, total)
        if ppo.entropy_coef > 0:
            loss = loss - ppo.entropy_coef * aggregate(output.entropy, mask, ppo.aggregation, total)
        self._measure_policy(output, scored, losses, clipped)
        return loss

    @torch.no_grad()
    def _measure_policy(self, output: PolicyOutput, scored: ScoredRollout, losses: Tensor, clipped: Tensor) -> None:
        mask, metrics = scored.rollout.mask, self.metrics
        log_ratio = (output.logprobs - scored.logprobs)[mask]
        ratio = log_ratio.exp()
        metrics.ratio_min = min(metrics.ratio_min, float(ratio.min()))
        metrics.ratio_max = max(metrics.ratio_max, float(ratio.max()))
        metrics.add(
            float(mask.sum()),
            policy_loss=float(masked_mean(losses.detach(), mask)),
            clipfrac=float(masked_mean(clipped.float(), mask)),
            approx_kl=float(log_ratio.square().mean() / 2),
            ratio=float(ratio.mean()),
            ratio_square=float(ratio.square().mean()),
        )

    def _value_loss(self, values: Tensor, piece: TrainingBatch, total: float) -> Tensor:
        scored, mask, returns = piece.scored, piece.mask, piece.advantages.returns
        if scored.values is None or returns is None:
            raise ValueError("a value function is trained, but the rollout was scored without values")
        losses, clipped = value_loss(values, scored.values, returns, mask, self.ppo.value_clip)
        self.metrics.add(
            float(mask.sum()),
            value_loss=float(masked_mean(losses.detach(), mask)),
            value_clipfrac=float(masked_mean(clipped.float(), mask)),
        )
        return aggregate(losses, mask, self.ppo.aggregation, total)

    def _optimizer_step(self, roles: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
        """Sum the ranks' gradients, clip each role by itself, check that every gradient is finite, step."""
        self.ranks.all_reduce_gradients(p for parameters in roles.values() for p in parameters.values())
        max_norm = math.inf if self.ppo.max_grad_norm is None else self.ppo.max_grad_norm
        for role, parameters in roles.items():
            norm = nn.utils.clip_grad_norm_(list(parameters.values()), max_norm)
            if not bool(norm.isfinite()):
                raise NumericError(
                    f"update: the gradient norm of the {role} is {float(norm)}; the optimizer was not stepped. "
                    "Usual causes: a learning rate too high, or half precision overflow (try model.dtype float32)."
                )
            self.metrics.add(1.0, **{f"{role}_grad_norm": float(norm)})
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _stats(self, steps: int, stopped: bool) -> UpdateStats:
        metrics = self.metrics
        ratio = metrics.mean("ratio")
        return UpdateStats(
            policy_loss=metrics.mean("policy_loss"),
            value_loss=metrics.mean("value_loss"),
            clipfrac=metrics.mean("clipfrac"),
            value_clipfrac=metrics.mean("value_clipfrac"),
            approx_kl=metrics.mean("approx_kl"),
            ratio_mean=ratio,
            ratio_std=math.sqrt(max(metrics.mean("ratio_square") - ratio**2, 0.0)),
            ratio_min=metrics.ratio_min,
            ratio_max=metrics.ratio_max,
            first_ratio_error=metrics.first_ratio_error or 0.0,
            policy_grad_norm=metrics.mean("policy_grad_norm"),
            value_grad_norm=metrics.mean("value_grad_norm"),
            learning_rate=_rate(self.optimizer.param_groups[0]),
            optimizer_steps=float(steps),
            stopped_early=float(stopped),
        )


def _rate(group: Mapping[str, Any]) -> float:
    """The rate of a group's role: a part of an adapter may learn faster by a factor."""
    return float(group["lr"]) / float(group.get("factor", 1.0))


def minibatches(count: int, size: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Row indices of each minibatch: in order, or in a new random order."""
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    yield from order.split(size)


@contextmanager
def _rows_named(rows: Tensor, epoch: int) -> Iterator[None]:
    """A NumericError names the minibatch it came from: the weights still are those that gave the number."""
    try:
        yield
    except NumericError as error:
        error.rows = rows.tolist()
        numbers = ", ".join(str(row + 1) for row in error.rows[:8])
        error.args = (f"{error} It came in epoch {epoch + 1}, in the minibatch of responses {numbers}.",)
        raise


def _backward(loss: Tensor) -> None:
    if not bool(loss.isfinite()):
        raise NumericError(
            f"update: the loss is {loss.item()}; no optimizer step was taken with it. Usual causes: a learning rate too high, "
            "float16 without scaling, or rewards far outside [-10, 10] (see shaping.clip)."
        )
    loss.backward()
