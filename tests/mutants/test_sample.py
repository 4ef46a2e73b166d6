"""A few mutants in every push (all of them: `make mutants`), and that the harness can tell a survivor."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SAMPLE = ("sign of the KL", "gamma forgotten", "clip on the wrong side", "reward read at the wrong token")


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("marl_run_mutants", Path(__file__).with_name("run_mutants.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.import_everything()
    return module


@pytest.mark.parametrize("name", SAMPLE)
def test_i27_mutants_are_killed(harness: Any, name: str) -> None:
    (mutant,) = (one for one in harness.catalogue() if one.name == name)
    outcome = harness.try_mutant(mutant)
    assert outcome.verdict == "killed", outcome
    assert "AssertionError" in outcome.by


def test_i27_there_are_enough_and_each_still_applies(harness: Any) -> None:
    """Each function is there and each text stands in it; that the tests notice is for `make mutants`."""
    mutants = harness.catalogue()
    assert len(mutants) >= 60
    for mutant in mutants:
        _, _, original = harness.find(mutant.function)
        assert mutant.change(original) is not original


def test_the_harness_can_fail(harness: Any) -> None:
    tests = ("tests/unit/test_objectives.py::TestKL::test_i13_k3",)

    def tried(function: str, change: Any, tests: tuple[str, ...] = tests) -> str:
        verdict: str = harness.try_mutant(harness.Mutant("one", function, change, tests)).verdict
        return verdict

    assert tried("kl_estimate", lambda original: lambda *args: original(*args)) == "survived"
    assert tried("kl_estimate", lambda original: lambda *args: undefined) == "broken: raises NameError"  # type: ignore[name-defined]  # noqa: F821
    assert tried("kl_estimates", lambda original: original).startswith("could not be tried: LookupError")
    assert tried("kl_estimate", lambda original: original, ("tests/unit/none.py",)).startswith(
        "its tests could not be run"
    )
