"""Score shaping between reward and PPO: missing-EOS penalty, running normalization, clip, in this order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from weakref import ref

from torch import Tensor

from marl_core.config.run_config import ShapingSection


@dataclass
class Shaper:
    """Applies a ShapingSection; keeps running moments (Welford, over all scores of the run) for normalization."""

    part: ShapingSection
    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    _learned: ref[Tensor] | None = field(default=None, repr=False, compare=False)

    def __call__(self, scores: Tensor, finished: Tensor, *, learn: bool = True) -> Tensor:
        """Shaped scores [B] float32; `learn` updates the moments with this batch first. The same tensor again is no new batch."""
        shaped = scores.float()
        if self.part.missing_eos_penalty is not None:
            shaped = shaped - self.part.missing_eos_penalty * (~finished).float()
        if self.part.normalize:
            if learn and (self._learned is None or self._learned() is not scores):
                self._learn(shaped)
                self._learned = ref(scores)
            shaped = (shaped - self.mean) / max(self.std, 1e-6)
        if self.part.clip is not None:
            shaped = shaped.clamp(-self.part.clip, self.part.clip)
        return shaped

    def ahead(self, scores: Tensor, finished: Tensor) -> Shaper:
        """This shaper as it is once it has learned the batch: a rollout may be scored more than once, and is learned by its update."""
        after = replace(self)
        after(scores, finished)
        return after

    def tokens(self, scores: Tensor | None) -> Tensor | None:
        """Scores of tokens [B, T] on the scale of the shaped scores.

        The penalty, the mean and the clip act on the response's total: the last token takes them up.
        """
        return scores / max(self.std, 1e-6) if scores is not None and self.part.normalize else scores

    @property
    def std(self) -> float:
        """Running standard deviation; 1 before two scores were seen."""
        return (self.squares / (self.count - 1)) ** 0.5 if self.count > 1 else 1.0

    def _learn(self, scores: Tensor) -> None:
        batch = scores.double().cpu()
        count, mean = float(len(batch)), float(batch.mean())
        total, delta = self.count + count, mean - self.mean
        self.squares += float((batch - mean).square().sum()) + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def restore(self, state: dict[str, float]) -> None:
        """Take over a checkpoint's state."""
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
