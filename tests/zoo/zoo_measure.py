"""Measure the zoo, one line a model: `python tests/zoo/zoo_measure.py [--out FILE] [--check NAME] [MODEL ...]`.

`--collect FOLDER` measures nothing: it joins what the tests wrote there (`make zoo`).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import zoo_models

RECORD = Path(__file__).parents[2] / "docs" / "models.json"


def line(name: str, found: dict[str, Any]) -> str:
    """A model in one line: right, or what is not."""
    bad = {check: one for check, one in found["checks"].items() if one["verdict"] in ("wrong", "refused")}
    if not bad:
        return f"right    {name}"
    word = "WRONG" if any(one["verdict"] == "wrong" for one in bad.values()) else "refused"
    told = "; ".join(f"[{check}] {one['said']} {one.get('where', '')}".strip() for check, one in bad.items())
    return f"{word:8} {name}: {told}"


def write(results: dict[str, Any], file: Path) -> None:
    """The results as JSON, a line for each model: verdicts, and what was said; not how far off within what is allowed."""
    lines = []
    for name, found in sorted(results.items()):
        checks = {
            check: {key: value for key, value in one.items() if key in ("verdict", "said") and value}
            for check, one in found["checks"].items()
        }
        lines.append(f"{json.dumps(name)}: {json.dumps({**found, 'checks': checks})}")
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def measured(names: list[str], only: list[str], out: str | None) -> dict[str, Any]:
    """Measure the models that are named, or all."""
    import torch
    from zoo_checks import measure

    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, entry in zoo_models.models().items():
        if names and name not in names:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(entry, Path(folder), only)
        print(f"{line(name, results[name])} ({time.perf_counter() - start:.1f} s)", flush=True)
        if out:
            write(results, Path(out))
    return results


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    parser.add_argument("--check", action="append", default=[])
    parser.add_argument("--collect")
    parser.add_argument("models", nargs="*")
    asked = parser.parse_args()
    if asked.collect is None:
        measured(asked.models, asked.check, asked.out)
        return
    results: dict[str, Any] = {}
    for file in Path(asked.collect).glob("*.json"):
        results |= json.loads(file.read_text(encoding="utf-8"))
    write(results, Path(asked.out or RECORD))
    for name, found in sorted(results.items()):
        print(line(name, found))


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="critical", TOKENIZERS_PARALLELISM="false")
    main()
