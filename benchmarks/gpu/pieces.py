"""Pieces of a PPO step, each beside the other ways to compute it: log-probs, attention, sampling, updates.

    python benchmarks/gpu/pieces.py --device cuda --shape full --out build/gpu/pieces.json --seconds 100
    python benchmarks/gpu/pieces.py --device cpu --shape tiny     # tries the part itself, in a minute

Ordered by worth: what comes late is what can be missed. On a GPU each group is measured in a process of its own.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # this folder is no package
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a kernel that isn't installed is not looked for

from aside import GROUP, Piece, Work, run_all, serve
from record import parse

MODULES = {
    "logprobs": "piece_logprobs",
    "attention": "piece_attention",
    "decode": "piece_decode",
    "graph": "piece_decode",
    "continuous": "piece_decode",
    "static": "piece_decode",
    "update": "piece_update",
    "compile": "piece_update",
}
FULL, TINY = ("full",), ("tiny",)
PIECES = [
    Piece("decode marl", "decode", 5, 20),
    Piece("decode limit", "decode", 1, 8),
    Piece("decode transformers", "decode", 5, 20),
    Piece("update recompute off", "update", 4, 20),
    Piece("update recompute on", "update", 2, 10),
    Piece("update checkpointing", "update", 2, 10),
    Piece("logprobs small", "logprobs", 4, 20),
    Piece("logprobs large", "logprobs", 5, 20),
    Piece("logprobs tiles", "logprobs", 6, 20),
    Piece("attention 64", "attention", 3, 15, FULL),
    Piece("attention 128", "attention", 3, 15, FULL),
    Piece("attention 16", "attention", 1, 15, TINY),
    Piece("update packing off", "update", 2, 10),
    Piece("update packing on", "update", 2, 10),
    Piece("update budget 16384", "update", 4, 12, FULL),
    Piece("update budget 8192", "update", 3, 12, FULL),
    Piece("update budget 32768", "update", 3, 12, FULL),
    Piece("update budget 4096", "update", 3, 12, FULL),
    Piece("update budget 2048", "update", 3, 12, FULL),
    Piece("update budget 512", "update", 1, 12, TINY),
    Piece("update budget 128", "update", 1, 12, TINY),
    Piece("decode graph", "graph", 5, 20),
    Piece("decode continuous", "continuous", 8, 25),
    Piece("decode marl, no adapter", "decode", 4, 15),
    Piece("update checkpointing, recompute on", "update", 2, 10),
    Piece("logprobs float32", "logprobs", 2, 10),
    Piece("logprobs many words", "logprobs", 2, 10, FULL),
    Piece("logprobs many tokens", "logprobs", 2, 10, FULL),
    Piece("logprobs wide", "logprobs", 2, 10, FULL),
    Piece("logprobs many of both", "logprobs", 3, 10, FULL),
    Piece("logprobs wide, many words", "logprobs", 2, 10, FULL),
    Piece("logprobs wide, many tokens", "logprobs", 2, 10, FULL),
    Piece("update compile", "compile", 25, 60, dear_on_cpu=True),
    Piece("decode static", "static", 25, 60),
]
"""By worth."""


def load(group: str, asked: Namespace) -> Work:
    """The measurements of one group's module, by name."""
    warnings.simplefilter("ignore")
    module = importlib.import_module(MODULES[group])
    found = module.measurements(asked.device, asked.shape)

    def work(name: str) -> dict[str, Any]:
        start = time.perf_counter()
        figures: dict[str, Any] = found[name]()
        return {**figures, "seconds_inside": round(time.perf_counter() - start, 3)}

    return work


def main() -> None:
    """Measure all pieces, or serve one group of them."""
    asked = parse("pieces", __doc__)
    if GROUP in os.environ:
        serve(lambda: load(os.environ[GROUP], asked))
    else:
        run_all("pieces", PIECES, asked, lambda group: load(group, asked))


if __name__ == "__main__":
    main()
