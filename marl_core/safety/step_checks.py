"""Guards of every step, always on: numbers that must be finite, numbers that must be plausible, rewards that differ.

What can't be right raises; what may be a bad setting warns once. The batch is dumped, so that it can be replayed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from marl_core.errors import NumericError, PluginError, warn
from marl_core.ppo.objectives import masked_mean
from marl_core.ppo.types import Rollout, ScoredRollout, UpdateStats
from marl_core.safety.plugin_guard import Watch

if TYPE_CHECKING:
    from marl_core.run.runner import Runner

ABOVE_ZERO = 1e-3
"""A log-prob may be above 0 by rounding, and by no more."""
FIRST_RATIO = {"float32": 1e-2, "bfloat16": 0.35, "float16": 0.35}
"""Largest |ratio - 1| of the first minibatch that is rounding; the same weights gave both log-probs."""
WILD_RATIO = 100.0
WILD_KL = 5.0
"""Nats per token to the reference: beyond it a model usually writes nothing that its base would."""
NEGATIVE_KL = -0.5
"""Nats per token. The mean of k1 over the policy's own samples estimates a number that can't be negative."""
ENOUGH_TOKENS = 64


@dataclass
class Guards:
    """The guards of one Runner."""

    watch: Watch = field(default_factory=Watch)
    _said: set[str] = field(default_factory=set)

    @contextmanager
    def phase(
        self,
        runner: Runner,
        name: str,
        rollout: Rollout,
        scored: ScoredRollout | None = None,
        own: object = None,
    ) -> Iterator[None]:
        """A phase of a step: when numbers or a plugin fail in it, what it worked on is dumped, and the error says where.

        `own`: scores or advantages that the caller gave.
        """
        from marl_core.safety.dump import dump

        try:
            yield
        except (NumericError, PluginError) as error:
            note = dump(runner, name, rollout, scored, error, own)
            error.args = (f"{error}{note}",)
            raise

    def scored(self, runner: Runner, scored: ScoredRollout) -> None:
        """Before any mathematics: finite numbers, log-probs that are log-probs, a plausible KL, rewards that differ."""
        mask, texts = scored.rollout.mask, scored.rollout.texts
        origin = runner.roles.reference_origin
        for name, tensor, whose in (
            (
                "log-prob of the policy",
                scored.logprobs,
                "The policy overflows in this dtype, or its weights are damaged",
            ),
            ("log-prob of the reference", scored.ref_logprobs, f"It comes from {origin}"),
            ("value", scored.values, "The value head overflows: lower value.learning_rate"),
            ("score", scored.scores, f"It comes from the reward after shaping ({_sources(runner)})"),
        ):
            if tensor is not None:
                _refuse_rows(name, ~tensor.isfinite(), tensor, texts, whose, "isn't finite")
                if name.startswith("log-prob"):
                    _refuse_rows(name, (tensor > ABOVE_ZERO) & mask, tensor, texts, whose, "is above 0: no probability")
        self._kl(scored, mask)
        self._variance(runner, scored)

    def _kl(self, scored: ScoredRollout, mask: Tensor) -> None:
        if scored.ref_logprobs is None:
            return
        kl = float(masked_mean(scored.logprobs - scored.ref_logprobs, mask))
        if kl > WILD_KL:
            self._warn(
                "kl",
                f"the KL to the reference is {kl:.3g} nats per token: the policy writes what the reference holds for next to "
                "impossible. Raise ppo.kl.coef, lower ppo.learning_rate, or set ppo.max_kl",
            )
        elif kl < NEGATIVE_KL and int(mask.sum()) >= ENOUGH_TOKENS:
            self._warn(
                "negative kl",
                f"the KL to the reference is estimated at {kl:.3g} nats per token, and a KL can't be negative: these responses "
                "aren't samples of the policy as it is scored (top_p, top_k, responses of one's own, or another policy)",
            )

    def _variance(self, runner: Runner, scored: ScoredRollout) -> None:
        raw = scored.raw_scores if scored.raw_scores is not None else scored.scores
        ppo, count = runner.config.ppo, len(raw)
        if count > 1 and float(raw.max() - raw.min()) == 0.0:
            self._warn(
                "variance",
                f"all {count} responses got the same score, {float(raw[0]):.6g}, from {_sources(runner)}: such a batch teaches nothing "
                "about what is better. Look at a few responses (samples.jsonl), and at the reward",
            )
        elif runner.plan.estimator.needs_groups and count % ppo.samples_per_prompt == 0:
            groups = raw.reshape(-1, ppo.samples_per_prompt)
            if bool((groups.max(dim=1).values == groups.min(dim=1).values).all()):
                self._warn(
                    "group variance",
                    f"within each of the {len(groups)} prompts all responses got the same score, so every advantage is 0: raise "
                    "ppo.samples_per_prompt or sampling.temperature, or use a finer reward",
                )

    def updated(self, runner: Runner, stats: UpdateStats) -> None:
        """After an update: its numbers and the new weights are finite, the ratio started at one, frozen is frozen."""
        for name, value in stats.as_dict().items():
            if not abs(value) <= torch.finfo(torch.float64).max:
                raise NumericError(f"update: {name} of this step is {value}. Usual cause: a learning rate too high.")
        _finite_weights(runner.roles.trained.parameters(runner.bank))
        first = stats.first_ratio_error
        if first > FIRST_RATIO[runner.bank.trunk.precision_of(runner.config.model.dtype)] and _no_dropout(runner):
            self._warn(
                "first ratio",
                f"the first minibatch's ratio is off by {first:.3g} before anything was changed: the pass that trains doesn't compute "
                "what the pass that scored did. Either this rollout was scored by other weights, or kernels differ between the two",
            )
        if stats.ratio_max > WILD_RATIO or 0 < stats.ratio_min < 1 / WILD_RATIO:
            self._warn(
                "ratio",
                f"a token's ratio reached {stats.ratio_min:.3g} .. {stats.ratio_max:.3g} in one update: steps this long are outside what "
                "PPO's clipping can hold. Lower ppo.learning_rate or ppo.epochs, or set ppo.max_kl",
            )

    def _warn(self, kind: str, sentence: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warn(f"{sentence}. (Said once a run.)")


@contextmanager
def sampling() -> Iterator[None]:
    """torch's own words when the next token's probabilities hold NaN or infinity, as a NumericError."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise NumericError(
            f"generate: the policy's next-token probabilities aren't finite ({error}). Its weights are, so the base overflows in this "
            "dtype: use model.dtype bfloat16 or float32."
        ) from error


def _no_dropout(runner: Runner) -> bool:
    return runner.config.policy.dropout == 0


def _sources(runner: Runner) -> str:
    """Who gives the scores."""
    return ", ".join(source.origin or source.name for source in runner.roles.rewards) or "scores of one's own"


def _refuse_rows(name: str, wrong: Tensor, tensor: Tensor, texts: object, whose: str, what: str) -> None:
    """NumericError that names the responses whose number is wrong, counted from 1, and the first one's text."""
    if not bool(wrong.any()):
        return
    rows = wrong.reshape(len(wrong), -1).any(dim=1).nonzero().flatten().tolist()
    value = float(tensor[wrong].flatten()[0])
    numbers = ", ".join(str(row + 1) for row in rows[:8])
    text = texts[rows[0]] if isinstance(texts, list | tuple) else ""
    raise NumericError(
        f"score: a {name} {what}: {value} in {len(rows)} of {len(wrong)} responses (number {numbers}); the first begins {text[:80]!r}. "
        f"{whose}. No step was taken with it."
    )


def _finite_weights(roles: Mapping[str, Mapping[str, Tensor]]) -> None:
    """NumericError when a trained weight isn't finite: one fused pass, one number to wait for."""
    for role, parameters in roles.items():
        tensors = [p.detach() for p in parameters.values()]
        norms = torch.stack(torch._foreach_norm(tensors, float("inf")))
        if not bool(norms.isfinite().all()):
            name = list(parameters)[int((~norms.isfinite()).nonzero()[0])]
            raise NumericError(
                f"update: after the optimizer's step the {role}'s weight {name} isn't finite, although its gradient was. The learning "
                "rate is far too high. Resume from the last checkpoint with a lower ppo.learning_rate (--override)."
            )
