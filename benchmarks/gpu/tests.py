"""The tests of tests/gpu on the device, each outcome and the differences it measured written down at once.

    python benchmarks/gpu/tests.py --device cuda
    python benchmarks/gpu/tests.py --device cpu --shape tiny

With seconds left on a GPU the suites that train and score on the CPU in CI follow, on the device.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from record import Record, parse  # this folder is no package

ROOT = Path(__file__).parents[2]
MINE = ["tests/gpu"]
ALL = [
    "tests/contract",
    *(
        f"tests/run/test_{name}.py"
        for name in ("strategies", "resume", "more_references", "more_rewards", "two_policies")
    ),
    *(f"tests/run/test_{name}.py" for name in ("inputs", "by_hand", "abstaining", "ends", "torchao", "compiled")),
    *(f"tests/unit/test_{name}.py" for name in ("update", "checkpoint", "publish")),
]
"""Suites whose runs take their device from the environment (tests/conftest.py). Others make tensors on the CPU to compare with, and fail
for that alone."""


class Outcomes:
    """A plugin of pytest: a row for each test, in the order in which they end; what fails is on disk at once."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called in the process that hands the tests out, too."""
        if report.when != "call" and report.outcome == "passed":
            return
        row: dict[str, Any] = {"name": report.nodeid}
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            said = getattr(crash, "message", None) or str(report.longrepr)[-600:]
            row["failed"] = (
                f"{'' if report.when == 'call' else f'in its {report.when}: '}{' '.join(said.split())[:600]}"
            )
            row["where"] = str(report.longrepr).splitlines()[-25:]
        elif report.outcome == "skipped":
            row["skipped"] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)[:200]
        else:
            row |= {"quiet": not report.user_properties, **dict(report.user_properties)}
        self.record.add({**row, "seconds_in_all": round(report.duration, 2)})


def main() -> int:
    """The exit code of pytest."""
    asked = parse("tests", __doc__)
    record = Record("tests", asked)
    os.chdir(ROOT)
    os.environ["MARL_TEST_DEVICE"] = asked.device
    import pytest

    workers = "2" if asked.device == "cpu" else str(min(8, os.cpu_count() or 1))
    # a warning of a library that is new there is no fault of the device
    common = ["-n", workers, "--dist", "load", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "--no-header"]
    code = int(pytest.main([*common, *MINE], plugins=[Outcomes(record)]))
    if asked.device == "cuda" and record.left > 30:
        code = max(code, int(pytest.main([*common, *ALL], plugins=[Outcomes(record)])))
    return code if code > 1 else 0  # tests that failed are rows


if __name__ == "__main__":
    raise SystemExit(main())
