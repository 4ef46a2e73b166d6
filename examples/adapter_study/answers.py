"""What the results say: intervals of differences, and the study's questions answered in sentences made of numbers.

Kinds are compared by the spread of all kinds' seeds together: three seeds of one kind alone say almost nothing of their own spread.
Intervals of several comparisons hold for all of them at once (Bonferroni), so that one of fifteen kinds doesn't stand out by chance.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Noise:
    """How much seeds of one kind differ: the standard deviation, and from how many degrees of freedom it is known."""

    std: float
    freedom: int

    @classmethod
    def of(cls, groups: Sequence[Sequence[float]]) -> "Noise":
        """Pooled over groups (one a kind) of runs (one a seed)."""
        freedom = sum(len(group) - 1 for group in groups if group)
        squares = sum((len(group) - 1) * statistics.variance(group) for group in groups if len(group) > 1)
        return cls(math.sqrt(squares / freedom) if freedom else math.nan, freedom)


@dataclass(frozen=True, slots=True)
class Difference:
    """One mean less another, and how far to both sides the interval reaches."""

    value: float
    margin: float

    @classmethod
    def of(cls, one: Sequence[float], two: Sequence[float], noise: Noise, comparisons: int = 1) -> "Difference":
        """Of two kinds' runs, as one of so many comparisons."""
        value = statistics.fmean(one) - statistics.fmean(two)
        if not noise.freedom:
            return cls(value, math.nan)
        quantile = student(1 - (1 - CONFIDENCE) / (2 * comparisons), noise.freedom)
        return cls(value, quantile * noise.std * math.sqrt(1 / len(one) + 1 / len(two)))

    @property
    def seen(self) -> bool:
        """Whether 0 lies outside the interval. Without a margin (one seed) nothing is seen."""
        return abs(self.value) > self.margin

    def told(self, digits: int = 3) -> str:
        """The difference with its interval."""
        if math.isnan(self.margin):
            return f"{self.value:+.{digits}f} (one seed only)"
        return f"{self.value:+.{digits}f} ± {self.margin:.{digits}f}"

    def verdict(self, digits: int = 3) -> str:
        """In words."""
        if math.isnan(self.margin):
            return f"not known from one seed ({self.value:+.{digits}f})"
        if not self.seen:
            return f"no difference ({self.told(digits)})"
        return f"{'better' if self.value > 0 else 'worse'} ({self.told(digits)})"


def student(probability: float, freedom: int) -> float:
    """The quantile of Student's t distribution, by expansion around the normal one (Abramowitz and Stegun 26.7.5).

    Within 1% from 4 degrees of freedom on at the probabilities that are asked here.
    """
    z = statistics.NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def rank_correlation(pairs: Mapping[str, tuple[float, float]]) -> float:
    """Spearman's: do two numbers put these kinds into the same order? 1 the same, -1 the opposite, 0 nothing to do with each other."""
    columns = [ranks([pair[side] for pair in pairs.values()]) for side in (0, 1)]
    if len(pairs) < 2 or any(len(set(column)) == 1 for column in columns):
        return math.nan
    return statistics.correlation(*columns)


def ranks(values: Sequence[float]) -> list[float]:
    """1 for the smallest; equals share the mean of their ranks."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]
