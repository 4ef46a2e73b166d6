"""The loggers below `marl`: milestones at INFO, phases with their seconds at DEBUG. Silent unless a program configures logging.

`marl.loading` tells what is read and how long that takes, `marl.preflight` the checks before the first step, `marl.run` the rest. Of
several processes that make one run the first alone speaks. No handler is added, a NullHandler neither: it would be for warnings, and
those of marl are Python's own.
"""

from __future__ import annotations

import logging
import os
from functools import cache

NAME = "marl"
LOADING, PREFLIGHT, RUN = (f"{NAME}.{part}" for part in ("loading", "preflight", "run"))


@cache
def logger(name: str) -> logging.Logger:
    """One of the loggers above."""
    found = logging.getLogger(name)
    found.addFilter(_of_the_first_process)
    return found


def _of_the_first_process(record: logging.LogRecord) -> bool:
    return os.environ.get("RANK", "0") == "0"
