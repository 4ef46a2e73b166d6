"""Tokenizers without torch: transformers imports it wherever it is installed, which costs a check more than all the rest."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
"""transformers' own switch: it would say that there is no torch."""


@contextmanager
def torch_kept_out() -> Iterator[None]:
    """A block in which transformers finds no torch, unless it was imported before. What was imported in the block is forgotten
    at its end, so that whoever needs transformers later gets it with torch.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        yield
        return
    before = set(sys.modules)
    quiet, os.environ[QUIET] = os.environ.get(QUIET), "1"
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to say that a module can't be imported
    try:
        yield
    finally:
        del sys.modules["torch"]
        if quiet is None:
            del os.environ[QUIET]
        else:
            os.environ[QUIET] = quiet
        for name in [name for name in sys.modules if name not in before and name.split(".")[0] == "transformers"]:
            del sys.modules[name]
