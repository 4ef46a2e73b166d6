"""How kinds are compared: rates by the size of a step, one number for a run, the choice of a rate. Plain functions of numbers.

Kinds differ a hundredfold in how far one step at the same rate carries the policy, so a comparison at one rate compares step sizes.
Here every kind gets three rates, at which its first step has the same three sizes as everybody's. The rate whose run scores best with
seed 0 is run with two more seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

SIZES = {"small": 0.03, "middle": 0.1, "large": 0.3}  # mean |change of a token's log-prob| by the first step, nats
SEEDS = (0, 1, 2)
YARDSTICK = "lora-16"  # the kind whose best rate is tried on all others, and from which differences are taken
FIRST_RATE = 1e-3  # where the probe begins; every kind's size at this rate is told
CLOSE = 0.1  # a measured size may be this far from the aim, as a share of it
TRIES = 4


def rate_for(size: float, measure: Callable[[float], float], known: tuple[float, float]) -> tuple[float, float]:
    """The rate at which a first step has this size, and the size measured there.

    A first step of AdamW is nearly proportional to its rate. `known`: a rate and the size measured there. The last of a few tries is
    taken where none comes close: a kind whose step can't be that large says so by its measured size.
    """
    rate, found = known
    for _ in range(TRIES):
        rate *= size / found
        found = measure(rate)
        if abs(found / size - 1) <= CLOSE:
            break
    return rate, found


def score(evals: Sequence[Mapping[str, Any]], bound: float) -> float:
    """A run in one number: its held-out reward at the last evaluation that is at most `bound` nats from the reference."""
    return float([row["reward"] for row in evals if row["kl"] <= bound][-1])


def best(runs: Mapping[str, Sequence[Mapping[str, Any]]], bound: float) -> str:
    """The size whose run scores best; of equals the smaller step. `runs`: the evaluations of the run with each size."""
    return max((size for size in SIZES if size in runs), key=lambda size: score(runs[size], bound))
