"""Write prompts.jsonl and heldout.jsonl: all sums of two digits, dealt once. `python examples/arithmetic/make_prompts.py`."""

import json
import random
from pathlib import Path

SHOTS = "2+3=5\n4+4=8\n9+6=15\n"
HELDOUT = 25


def rows() -> tuple[list[str], list[str]]:
    """The lines of both files: the same sums in the same order on every machine."""
    sums = [(one, other) for one in range(10) for other in range(10)]
    sums = [(one, other) for one, other in sums if f"{one}+{other}=" not in SHOTS]
    random.Random(0).shuffle(sums)
    lines = [json.dumps({"prompt": f"{SHOTS}{one}+{other}=", "answer": one + other}) for one, other in sums]
    return lines[HELDOUT:], lines[:HELDOUT]


if __name__ == "__main__":
    for name, lines in zip(("prompts", "heldout"), rows(), strict=True):
        Path(__file__).with_name(f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
