"""`make` alone, and `make help`, list every target with what it does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_target_is_listed_and_described() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = (line.split()[1:] for line in text.splitlines() if line.startswith(".PHONY:"))
    alone = {
        name: value for name, value in os.environ.items() if not name.startswith("MAKE")
    }  # `make test` is a make, too
    for command in (["make", "help"], ["make"]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=alone)
        listed = dict(line.removeprefix("make ").split(maxsplit=1) for line in done.stdout.splitlines())
        assert sorted(listed) == sorted(phony)
        assert all(listed.values())
