"""Measure the zoo: `python tests/zoo/measure.py [--out FILE] [--check NAME] [MODEL ...]`, one line a model."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="critical", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parent))

import table  # noqa: E402


def line(name: str, found: dict[str, Any]) -> str:
    """A model in one line: right, or what is not."""
    bad = {check: one for check, one in found["checks"].items() if one["verdict"] in ("wrong", "refused")}
    if not bad:
        return f"right    {name}"
    word = "WRONG" if any(one["verdict"] == "wrong" for one in bad.values()) else "refused"
    told = "; ".join(f"[{check}] {one['said']} {one.get('where', '')}".strip() for check, one in bad.items())
    return f"{word:8} {name}: {told}"


def main() -> None:
    """Measure the models that are named, or all."""
    import torch

    from checks import measure

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    parser.add_argument("--check", action="append", default=[])
    parser.add_argument("models", nargs="*")
    asked = parser.parse_args()
    results = {}
    for name, entry in table.models().items():
        if asked.models and name not in asked.models:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(entry.model_type, table.small_config(entry), Path(folder), asked.check)
        print(f"{line(name, results[name])} ({time.perf_counter() - start:.1f} s)", flush=True)
        if asked.out:
            Path(asked.out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
