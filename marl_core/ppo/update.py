"""Epochs, minibatches and optimizer steps -> UpdateStats.

The first epoch goes through the rollout in order, in the very pieces that were scored: its first minibatch has ratio
one exactly. Later epochs shuffle.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.heads import apply_head
from marl_core.config.run_config import PPOSection
from marl_core.errors import NumericError
from marl_core.ppo.objectives import aggregate, kl_estimate, masked_mean, masked_sum, policy_loss, value_loss
from marl_core.ppo.ranks import ALONE, Ranks
from marl_core.ppo.scoring import Passed, blocks, forward, response_hidden
from marl_core.ppo.types import Advantages, ScoredRollout, UpdateStats


@dataclass(frozen=True, slots=True)
class Trained:
    """The roles that learn: the policy adapter, the value head, and the value's own adapter if it has one."""

    policy: str
    value_head: str | None
    value_adapter: str | None

    @property
    def value_on_policy(self) -> bool:
        """Whether policy and value share one forward."""
        return self.value_head is not None and self.value_adapter is None

    def parameters(self, bank: AdapterBank) -> dict[str, dict[str, nn.Parameter]]:
        """Explicit parameters by role: never "all that require grad"."""
        roles = {"policy": bank.parameters(self.policy)}
        if self.value_head is not None:
            own = bank.parameters(self.value_adapter) if self.value_adapter else {}
            roles["value"] = {**own, **bank.parameters(self.value_head)}
        return roles


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything one update needs, row by row."""

    scored: ScoredRollout
    advantages: Advantages

    def select(self, rows: Tensor) -> Batch:
        """Some of the rows."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        s, a = self.scored, self.advantages
        scored = ScoredRollout(
            s.rollout.select(rows), s.logprobs[rows], pick(s.ref_logprobs), pick(s.values), s.scores[rows]
        )
        return Batch(scored, Advantages(a.kl[rows], a.rewards[rows], a.advantages[rows], pick(a.returns)))


class Tally:
    """Weighted means, extremes and first values of an update's numbers."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._weights: dict[str, float] = defaultdict(float)
        self.ratio_min, self.ratio_max = math.inf, -math.inf
        self.first_ratio_error: float | None = None

    def add(self, weight: float, **values: float) -> None:
        """Add numbers that are means over `weight` things."""
        for name, value in values.items():
            self._sums[name] += value * weight
            self._weights[name] += weight

    def join(self, ranks: Ranks) -> None:
        """Take in what the other ranks have tallied."""
        names = sorted(self._sums)
        sums = ranks.sum([*(self._sums[name] for name in names), *(self._weights[name] for name in names)])
        self._sums.update(zip(names, sums[: len(names)], strict=True))
        self._weights.update(zip(names, sums[len(names) :], strict=True))
        low, self.ratio_max, error = ranks.largest([-self.ratio_min, self.ratio_max, self.first_ratio_error or 0.0])
        self.ratio_min, self.first_ratio_error = -low, error

    def mean(self, name: str) -> float:
        """Weighted mean; 0 if nothing was added."""
        return self._sums[name] / self._weights[name] if self._weights[name] else 0.0


def update_epochs(
    bank: AdapterBank,
    trained: Trained,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    ppo: PPOSection,
    *,
    temperature: float,
    kl_coef: float,
    generator: torch.Generator,
    ranks: Ranks = ALONE,
    tokens: int | None = None,
) -> UpdateStats:
    """Run `ppo.epochs` over the batch and step the optimizer once a minibatch, its rows shared out over ranks, `tokens` a pass."""
    tally = Tally()
    roles = trained.parameters(bank)
    steps, stopped = 0, False
    optimizer.zero_grad(set_to_none=True)  # whatever an update that failed left behind
    for epoch in range(ppo.epochs):
        for rows in minibatches(len(batch.scored.rollout), ppo.minibatch, None if epoch == 0 else generator):
            with _rows_named(rows, epoch):
                approxkl = _minibatch(
                    bank, trained, batch.select(rows), ppo, temperature, kl_coef, tally, ranks, tokens
                )
                if ppo.max_kl is not None and approxkl > ppo.max_kl:
                    stopped = True
                    break
                ranks.sum_gradients(p for parameters in roles.values() for p in parameters.values())
                _optimizer_step(roles, optimizer, ppo.max_grad_norm, tally)
            steps += 1
        if stopped:
            break
    optimizer.zero_grad(set_to_none=True)
    tally.join(ranks)
    return _stats(tally, optimizer, steps, stopped)


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


def minibatches(count: int, size: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Row indices of each minibatch: in order, or in a new random order."""
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    yield from order.split(size)


def _minibatch(
    bank: AdapterBank,
    trained: Trained,
    batch: Batch,
    ppo: PPOSection,
    temperature: float,
    kl_coef: float,
    tally: Tally,
    ranks: Ranks,
    tokens: int | None,
) -> float:
    """Forward and backward of this rank's rows of one minibatch, a microbatch at a time; the minibatch's approx_kl."""
    mask = batch.scored.rollout.mask
    total = float(mask.sum()) if ppo.aggregation == "token" else float(len(mask))
    approxkl = 0.0
    mine = ranks.share(torch.arange(len(mask)))
    lengths = batch.scored.rollout.sequence_mask.sum(dim=1)[mine].tolist()
    for rows in blocks(lengths, ppo.microbatch or len(mine), tokens):
        piece = batch.select(mine[rows])
        with bank.using(trained.policy, train=True):  # forward and backward: one block
            head = trained.value_head if trained.value_on_policy else None
            passed = forward(bank, piece.scored.rollout, temperature, value_head=head, entropy=ppo.entropy_coef > 0)
            loss = _policy_terms(passed, piece, ppo, kl_coef, total, tally)
            if passed.values is not None:
                loss = loss + ppo.value_coef * _value_terms(passed.values, piece, ppo, total, tally)
            _backward(loss)
        if trained.value_adapter is not None and trained.value_head is not None:
            with bank.using(trained.value_adapter, train=True):
                values = apply_head(bank.heads[trained.value_head], response_hidden(bank, piece.scored.rollout))
                _backward(_value_terms(values, piece, ppo, total, tally))
        log_ratio = passed.logprobs.detach() - piece.scored.logprobs
        approxkl += float(masked_sum(log_ratio.square() / 2, piece.scored.rollout.mask) / mask.sum())
    if tally.first_ratio_error is None:
        tally.first_ratio_error = max(abs(tally.ratio_min - 1), abs(tally.ratio_max - 1))
    return ranks.sum([approxkl])[0]


def _policy_terms(passed: Passed, piece: Batch, ppo: PPOSection, kl_coef: float, total: float, tally: Tally) -> Tensor:
    scored, mask = piece.scored, piece.scored.rollout.mask
    losses, clipped = policy_loss(
        passed.logprobs, scored.logprobs, piece.advantages.advantages, mask, ppo.clip.low, ppo.clip.high, ppo.dual_clip
    )
    loss = aggregate(losses, mask, ppo.aggregation, total)
    if ppo.kl.into == "loss" and kl_coef > 0 and scored.ref_logprobs is not None:
        kl = kl_estimate(passed.logprobs, scored.ref_logprobs, ppo.kl.estimator)
        loss = loss + kl_coef * aggregate(kl, mask, ppo.aggregation, total)
    if ppo.entropy_coef > 0:
        loss = loss - ppo.entropy_coef * aggregate(passed.entropy, mask, ppo.aggregation, total)
    with torch.no_grad():
        log_ratio = (passed.logprobs - scored.logprobs)[mask]
        ratio = log_ratio.exp()
        tally.ratio_min = min(tally.ratio_min, float(ratio.min()))
        tally.ratio_max = max(tally.ratio_max, float(ratio.max()))
        tally.add(
            float(mask.sum()),
            policy_loss=float(masked_mean(losses.detach(), mask)),
            clipfrac=float(masked_mean(clipped.float(), mask)),
            approxkl=float(log_ratio.square().mean() / 2),
            ratio=float(ratio.mean()),
            ratio_square=float(ratio.square().mean()),
        )
    return loss


def _value_terms(values: Tensor, piece: Batch, ppo: PPOSection, total: float, tally: Tally) -> Tensor:
    scored, mask, returns = piece.scored, piece.scored.rollout.mask, piece.advantages.returns
    if scored.values is None or returns is None:
        raise ValueError("a value function is trained, but the rollout was scored without values")
    losses, clipped = value_loss(values, scored.values, returns, mask, ppo.value_clip)
    tally.add(
        float(mask.sum()),
        value_loss=float(masked_mean(losses.detach(), mask)),
        value_clipfrac=float(masked_mean(clipped.float(), mask)),
    )
    return aggregate(losses, mask, ppo.aggregation, total)


def _backward(loss: Tensor) -> None:
    if not bool(loss.isfinite()):
        raise NumericError(
            f"update: the loss is {loss.item()}; no optimizer step was taken with it. Usual causes: a learning rate too high, "
            "float16 without scaling, or rewards far outside [-10, 10] (see shaping.clip)."
        )
    loss.backward()


def _optimizer_step(
    roles: Mapping[str, Mapping[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    max_norm: float | None,
    tally: Tally,
) -> None:
    """Clip each role by itself, check that every gradient is finite, step."""
    for role, parameters in roles.items():
        norm = nn.utils.clip_grad_norm_(list(parameters.values()), max_norm if max_norm is not None else math.inf)
        if not bool(norm.isfinite()):
            raise NumericError(
                f"update: the gradient norm of the {role} is {float(norm)}; the optimizer was not stepped. "
                "Usual causes: a learning rate too high, or half precision overflow (try model.dtype float32)."
            )
        tally.add(1.0, **{f"{role}_grad_norm": float(norm)})
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _stats(tally: Tally, optimizer: torch.optim.Optimizer, steps: int, stopped: bool) -> UpdateStats:
    ratio = tally.mean("ratio")
    return UpdateStats(
        policy_loss=tally.mean("policy_loss"),
        value_loss=tally.mean("value_loss"),
        clipfrac=tally.mean("clipfrac"),
        value_clipfrac=tally.mean("value_clipfrac"),
        approxkl=tally.mean("approxkl"),
        ratio_mean=ratio,
        ratio_std=math.sqrt(max(tally.mean("ratio_square") - ratio**2, 0.0)),
        ratio_min=tally.ratio_min,
        ratio_max=tally.ratio_max,
        first_ratio_error=tally.first_ratio_error or 0.0,
        policy_grad_norm=tally.mean("policy_grad_norm"),
        value_grad_norm=tally.mean("value_grad_norm"),
        learning_rate=float(optimizer.param_groups[0]["lr"]),
        optimizer_steps=float(steps),
        stopped_early=float(stopped),
    )
