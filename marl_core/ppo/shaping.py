"""Shaping of scores before PPO sees them: a penalty for unfinished responses, normalization by running moments, a clip."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from marl_core.config.run_config import ShapingSection
from marl_core.ppo.types import ScoredRollout

SMALLEST_STD = 1e-6
"""The smallest standard deviation that scores are divided by."""


@dataclass(frozen=True, slots=True)
class RewardStats:
    """Running moments of all scores that a run has trained on (Welford 1962; batches merged as in Chan et al. 1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances to the mean."""

    @property
    def std(self) -> float:
        """Standard deviation, unbiased; 1 before two scores were seen."""
        return (self.squares / (self.count - 1)) ** 0.5 if self.count > 1 else 1.0

    def updated(self, scores: Tensor) -> RewardStats:
        """With the scores [B] of one more batch."""
        batch = scores.double().cpu()
        count, mean = float(len(batch)), float(batch.mean())
        total, delta = self.count + count, mean - self.mean
        return RewardStats(
            total,
            self.mean + delta * count / total,
            self.squares + float((batch - mean).square().sum()) + delta**2 * self.count * count / total,
        )


def learned(stats: RewardStats, scores: Tensor, finished: Tensor, section: ShapingSection) -> RewardStats:
    """The moments after a batch with scores [B] and finished [B] bool; unchanged unless scores are normalized."""
    return stats.updated(penalized(scores, finished, section)) if section.normalize else stats


def penalized(scores: Tensor, finished: Tensor, section: ShapingSection) -> Tensor:
    """Scores [B] float32, less the penalty for each response that has no stop token."""
    if section.missing_eos_penalty is None:
        return scores.float()
    return scores.float() - section.missing_eos_penalty * (~finished).float()


def shape_scores(scores: Tensor, finished: Tensor, section: ShapingSection, stats: RewardStats) -> Tensor:
    """Shaped scores [B] float32: penalized, normalized by `stats`, clipped; each as the section asks."""
    shaped = penalized(scores, finished, section)
    if section.normalize:
        shaped = (shaped - stats.mean) / max(stats.std, SMALLEST_STD)
    if section.clip is not None:
        shaped = shaped.clamp(-section.clip, section.clip)
    return shaped


def shape(scored: ScoredRollout, section: ShapingSection, stats: RewardStats) -> ScoredRollout:
    """A scored rollout with its scores shaped, by the moments that include this batch.

    Token scores are divided by the same standard deviation. Penalty, mean and clip change a response's total; that part lands
    on its last token.
    """
    finished = scored.rollout.finished
    after = learned(stats, scored.scores, finished, section)
    tokens = scored.token_scores
    if tokens is not None and section.normalize:
        tokens = tokens / max(after.std, SMALLEST_STD)
    return replace(scored, shaped_scores=shape_scores(scored.scores, finished, section, after), token_scores=tokens)
