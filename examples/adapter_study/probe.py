"""The rates at which a kind's first step has the study's three sizes."""

import time
from collections.abc import Mapping
from typing import Any

import protocol
from trial import first_step, short


def rates(config: Mapping[str, Any], sizes: Mapping[str, float]) -> dict[str, Any]:
    """The rate for each size, the size measured there, and the size at the rate where every kind's probe begins."""
    started = time.process_time()

    def measure(rate: float) -> float:
        return first_step(config, rate)

    known = protocol.FIRST_RATE, measure(protocol.FIRST_RATE)
    found = {name: protocol.rate_for(size, measure, known) for name, size in sizes.items()}
    return {
        "at_first_rate": short(known[1]),
        "rates": {name: short(rate) for name, (rate, _) in found.items()},
        "sizes": {name: short(size) for name, (_, size) in found.items()},
        "cpu_seconds": round(time.process_time() - started, 1),
    }
