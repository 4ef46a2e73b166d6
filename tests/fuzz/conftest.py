"""How many examples: a fixed few in every push, thousands of random ones with MARL_FUZZ_TIMES (`make fuzz`)."""

from __future__ import annotations

import builtins
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("MARL_FUZZ_TIMES", "1"))
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets")
HANGS = 60
"""Seconds after which one example hangs; each takes milliseconds."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Property tests of this folder: a fixed seed in a push, chance at night, and no database either way."""
    for item in items:
        function: Any = getattr(item, "obj", None)
        if Path(__file__).parent in item.path.parents and hasattr(function, "hypothesis"):
            few: settings = function._hypothesis_internal_use_settings
            function._hypothesis_internal_use_settings = settings(
                few, max_examples=few.max_examples * TIMES, derandomize=TIMES == 1, database=None, deadline=None,
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip


@contextmanager
def hanging() -> Iterator[None]:
    """AssertionError in an example that doesn't end."""

    def ring(*_: Any) -> None:
        raise AssertionError(f"still running after {HANGS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run `marl` in process: it must end with an exit code of the design, one message, and no heavy import."""
    from marl_core.cli.app import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> int:
        heavy: list[str] = []
        plain = builtins.__import__

        def watched(name: str, *rest: Any, **named: Any) -> Any:
            if name.split(".")[0] in HEAVY and (rest and (rest[0] or {}).get("__name__", "").startswith("marl_")):
                heavy.append(name)
            return plain(name, *rest, **named)

        builtins.__import__ = watched
        try:
            with hanging():
                code = main(list(arguments))
        finally:
            builtins.__import__ = plain
        shown = capsys.readouterr()
        assert code in (0, 2, 3, 4), shown.err
        assert "Traceback" not in shown.err
        assert "a bug in marl" not in shown.err
        assert code == 0 or shown.err.strip()
        assert heavy == []
        return code

    return run
