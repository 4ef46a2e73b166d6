"""Checks of every step, always on: numbers that must be finite, numbers that must be plausible, rewards that differ.

What can't be right raises; what may be a bad setting warns once.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from marl_core.config.run_config import RunConfig
from marl_core.errors import OVERRIDE, NumericError, in_words, warn
from marl_core.ppo.objectives import masked_mean
from marl_core.ppo.step import Step
from marl_core.ppo.types import ScoredRollout, UpdateStats

LOGPROB_ROUNDING = 1e-3
"""A log-prob may be above 0 by rounding, and by no more."""
FIRST_RATIO_TOLERANCE = {"float32": 1e-2, "bfloat16": 0.35, "float16": 0.35}
"""Largest |ratio - 1| of the first minibatch that is rounding; the same weights gave both log-probs."""
WILD_RATIO = 100.0
"""Ratio of one token in one update, or its inverse, beyond which PPO's clipping doesn't hold the step."""
WILD_KL_NATS = 5.0
"""Nats per token to the reference: beyond it a model usually writes nothing that its base would."""
NEGATIVE_KL_NATS = -0.5
"""Nats per token. The mean of k1 over the policy's own samples estimates a number that can't be negative."""
TOKENS_FOR_A_MEAN = 64
"""Fewest tokens whose mean KL estimate is compared with `NEGATIVE_KL_NATS`."""


@dataclass
class StepChecks:
    """The checks of one run; each warning is given once."""

    config: RunConfig
    _warned: set[str] = field(default_factory=set)

    def check_scored(self, step: Step, scored: ScoredRollout) -> None:
        """Before the update: NumericError unless numbers are finite and no log-prob above 0; warnings for an odd KL or equal rewards."""
        mask, texts = scored.rollout.mask, scored.rollout.texts
        origin = step.roles.reference_origin
        for name, tensor, cause in (
            (
                "log-prob of the policy",
                scored.logprobs,
                "The policy overflows in this dtype, or its weights are damaged",
            ),
            ("log-prob of the reference", scored.ref_logprobs, f"It comes from {origin}"),
            ("value", scored.values, "The value head overflows: lower value.learning_rate"),
            ("score", scored.shaped_scores, f"It comes from the reward after shaping ({_sources(step)})"),
        ):
            if tensor is not None:
                _refuse_rows(name, ~tensor.isfinite(), tensor, texts, cause, "isn't finite")
                if name.startswith("log-prob"):
                    _refuse_rows(
                        name, (tensor > LOGPROB_ROUNDING) & mask, tensor, texts, cause, "is above 0: no probability"
                    )
        self._kl(scored, mask)
        self._variance(step, scored)

    def _kl(self, scored: ScoredRollout, mask: Tensor) -> None:
        if scored.ref_logprobs is None:
            return
        kl = float(masked_mean(scored.logprobs - scored.ref_logprobs, mask))
        if kl > WILD_KL_NATS:
            self._warn(
                "kl",
                f"the KL to the reference is {kl:.3g} nats per token: the policy writes what the reference holds for next to "
                "impossible. Raise ppo.kl.coef, lower ppo.learning_rate, or set ppo.max_kl",
            )
        elif kl < NEGATIVE_KL_NATS and int(mask.sum()) >= TOKENS_FOR_A_MEAN:
            self._warn(
                "negative kl",
                f"the KL to the reference is estimated at {kl:.3g} nats per token, and a KL can't be negative: these responses "
                "aren't samples of the policy as it is scored (top_p, top_k, responses of one's own, or another policy)",
            )

    def _variance(self, step: Step, scored: ScoredRollout) -> None:
        scores, ppo, count = scored.scores, step.ppo, len(scored.scores)
        if count > 1 and float(scores.max() - scores.min()) == 0.0:
            self._warn(
                "variance",
                f"all {count} responses got the same score, {float(scores[0]):.6g}, from {_sources(step)}: such a batch teaches nothing "
                f"about what is better. Look at a few responses (samples.jsonl), and at the reward{_of_chats(step, scored)}",
            )
        elif step.estimator.needs_groups and count % ppo.samples_per_prompt == 0:
            groups = scores.reshape(-1, ppo.samples_per_prompt)
            if bool((groups.max(dim=1).values == groups.min(dim=1).values).all()):
                self._warn(
                    "group variance",
                    f"within each of the {len(groups)} prompts all responses got the same score, so every advantage is 0: raise "
                    "ppo.samples_per_prompt or sampling.temperature, or use a finer reward",
                )

    def check_update(self, step: Step, stats: UpdateStats) -> None:
        """After an update: NumericError unless its numbers and the trained weights are finite; warnings for odd ratios."""
        for name, value in stats.as_dict().items():
            if not abs(value) <= torch.finfo(torch.float64).max:
                raise NumericError(f"update: {name} of this step is {value}. Usual cause: a learning rate too high.")
        _finite_weights(step.roles.trained.parameters(step.bank))
        first, precision = stats.first_ratio_error, step.bank.trunk.precision_of(self.config.model.dtype)
        if first > FIRST_RATIO_TOLERANCE[precision] and self.config.policy.dropout == 0:
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
        if kind not in self._warned:
            self._warned.add(kind)
            warn(f"{sentence}. (Said once a run.)")


@contextmanager
def finite_sampling() -> Iterator[None]:
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


def _sources(step: Step) -> str:
    """Who gives the scores."""
    return ", ".join(source.origin or source.name for source in step.roles.rewards) or "scores of one's own"


def _of_chats(step: Step, scored: ScoredRollout) -> str:
    """What a reward function often takes for a text, as the end of a sentence, where prompts are chats and a source calls a function."""
    chats = any(not isinstance(text, str) for text in scored.rollout.prompts.texts or ())
    functions = (inspect.unwrap(source.score) for source in step.roles.rewards if callable(source.score))
    calls_the_users = any(hasattr(function, "label") for function in functions)  # as the strategy `function` marks it
    if not (chats and calls_the_users):
        return ""
    return ". A completion is a list of one message here: its text is completion[0]['content']"


def _refuse_rows(name: str, wrong: Tensor, tensor: Tensor, texts: object, cause: str, what: str) -> None:
    """NumericError that names the responses whose number is wrong, counted from 1, and the first one's text."""
    if not bool(wrong.any()):
        return
    rows = wrong.reshape(len(wrong), -1).any(dim=1).nonzero().flatten().tolist()
    value = float(tensor[wrong].flatten()[0])
    numbers = ", ".join(str(row + 1) for row in rows[:8])
    text = texts[rows[0]] if isinstance(texts, list | tuple) else ""
    raise NumericError(
        f"score: a {name} {what}: {value} in {len(rows)} of {len(wrong)} responses (number {numbers}); the first begins {text[:80]!r}. "
        f"{cause}. No step was taken with it."
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
                f"rate is far too high. Resume from the last checkpoint with a lower ppo.learning_rate ({in_words(*OVERRIDE)})."
            )
