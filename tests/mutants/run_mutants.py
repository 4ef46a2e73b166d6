"""Mutation tests: deliberate faults in the mathematics and the bank, each of which some test must notice.

    python tests/mutants/run_mutants.py [--list] [NAME ...]

A mutant changes one function, found by its name wherever it lives in the package: either its text (the old text must
stand there exactly once) or what goes into and comes out of it. A child process, forked once everything is imported,
puts it in place of the original everywhere and runs the tests that must fail. A mutant that survives, that no longer
applies, or whose tests fail without it, fails the whole.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import pkgutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("marl_core", "marl_plugins")
OWN_FAULTS = ("NameError", "SyntaxError", "UnboundLocalError", "IndentationError")
"""What a badly written mutant raises: it was not a test that noticed."""

Change = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault: what it is, the function (or Class.method) that gets it, and the tests that must see it."""

    name: str
    function: str
    change: Change
    tests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a mutant: `killed`, or why not; the test that noticed."""

    verdict: str
    by: str = ""


# -- finding it and putting it in place ---------------------------------------------------------------------------


def import_everything() -> None:
    """Import every module of the package, so that functions are found and forks start warm."""
    for name in PACKAGES:
        package = importlib.import_module(name)
        for found in pkgutil.walk_packages(package.__path__, f"{name}."):
            importlib.import_module(found.name)


def _modules() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in PACKAGES:
            yield module


def find(name: str) -> tuple[Any, str, Any]:
    """Holder (module or class), attribute and function of `name`; LookupError unless there is exactly one.

    `name@module` says where, for a name that several modules have.
    """
    name, _, where = name.partition("@")
    first, _, rest = name.partition(".")
    homes = [m for m in _modules() if getattr(vars(m).get(first), "__module__", None) == m.__name__]
    homes = [home for home in homes if where in ("", home.__name__)]
    if len(homes) != 1:
        names = [home.__name__ for home in homes]
        raise LookupError(f"{name} is defined in {len(homes)} modules {names}: write name@module")
    holder: Any = getattr(homes[0], first) if rest else homes[0]
    attribute = rest or first
    if attribute not in vars(holder):
        raise LookupError(f"{name} is not defined any more")
    return holder, attribute, vars(holder)[attribute]


@contextlib.contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """Put the mutant in place of the original, in every module that holds it, and take it out again."""
    holder, attribute, original = find(mutant.function)
    mutated = mutant.change(original)
    places = [(holder, attribute)] if isinstance(holder, type) else _holders(original)
    for place, key in places:
        setattr(place, key, mutated)
    try:
        yield
    finally:
        for place, key in places:
            setattr(place, key, original)


def _holders(original: Any) -> list[tuple[ModuleType, str]]:
    return [(module, key) for module in list(sys.modules.values()) if isinstance(module, ModuleType)
            for key, value in list(vars(module).items()) if value is original]  # fmt: skip


# -- running ------------------------------------------------------------------------------------------------------


class Recorder:
    """A pytest plugin that remembers the first failure."""

    def __init__(self) -> None:
        self.first: tuple[str, str] | None = None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        report: Any = yield
        if report.failed and self.first is None and call.excinfo is not None:
            self.first = (item.nodeid, call.excinfo.typename)
        return report


def run_tests(tests: Iterable[str], folder: Path) -> Outcome:
    """Run tests in this process until one fails."""
    recorder = Recorder()
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    options += [f"--basetemp={folder}", "-c", str(ROOT / "pyproject.toml")]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins were imported with everything else
    code = pytest.main([*options, *(str(ROOT / test) for test in tests)], plugins=[recorder])
    if code == pytest.ExitCode.OK:
        return Outcome("survived")
    if code != pytest.ExitCode.TESTS_FAILED or recorder.first is None:
        return Outcome(f"its tests could not be run (pytest exit {int(code)})")
    test, error = recorder.first
    return Outcome(f"broken: raises {error}" if error in OWN_FAULTS else "killed", f"{test} ({error})")


def in_child(work: Callable[[Path], Outcome]) -> Outcome:
    """Do `work` in a forked child, silently; its outcome."""
    with tempfile.TemporaryDirectory(prefix="marl-mutant-") as folder:
        answer = Path(folder) / "answer.json"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads: the child uses one
            child = os.fork()
        if child == 0:
            try:
                _silence()
                found = work(Path(folder) / "pytest")
            except BaseException as error:  # the child must not return into the parent's code
                found = Outcome(f"could not be tried: {type(error).__name__}: {error}")
            answer.write_text(json.dumps([found.verdict, found.by]), encoding="utf-8")
            os._exit(0)
        os.waitpid(child, 0)
        if not answer.is_file():
            return Outcome("killed", "the process died")
        verdict, by = json.loads(answer.read_text(encoding="utf-8"))
        return Outcome(verdict, by)


def _silence() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def try_mutant(mutant: Mutant) -> Outcome:
    """Whether the mutant's tests notice it."""

    def work(folder: Path) -> Outcome:
        with applied(mutant):
            return run_tests(mutant.tests, folder)

    return in_child(work)


def main(arguments: list[str] | None = None) -> int:
    """Try the named mutants, or all; 0 when every one was killed and no test fails without them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args(arguments)
    mutants = [m for m in catalogue() if not asked.names or m.name in asked.names]
    if asked.list:
        print("\n".join(f"{m.name}: {m.function}" for m in mutants))
        return 0
    import_everything()
    import torch

    torch.set_num_threads(1)  # a child of a process with several threads may hang
    start = time.perf_counter()
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    clean = in_child(lambda folder: run_tests(tests, folder))
    if clean.verdict != "survived":
        print(f"without any mutant: {clean.verdict} {clean.by}", file=sys.stderr)
        return 1
    print(f"without mutants all pass ({time.perf_counter() - start:.0f} s)", flush=True)
    alive = 0
    for mutant in mutants:
        outcome = try_mutant(mutant)
        alive += outcome.verdict != "killed"
        print(
            f"{outcome.verdict:<9} {mutant.name}  by {outcome.by}"
            if outcome.by
            else f"{outcome.verdict}: {mutant.name}",
            flush=True,
        )
    print(f"{len(mutants) - alive} of {len(mutants)} mutants killed in {time.perf_counter() - start:.0f} s")
    return 1 if alive or not mutants else 0


def catalogue() -> tuple[Mutant, ...]:
    """All mutants, from catalogue.py beside this file."""
    spec = importlib.util.spec_from_file_location("marl_mutants_catalogue", Path(__file__).with_name("catalogue.py"))
    if spec is None or spec.loader is None:
        raise ImportError("catalogue.py can't be loaded")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    mutants = tuple(Mutant(*fields) for fields in module.MUTANTS)
    if len({mutant.name for mutant in mutants}) != len(mutants):
        raise ValueError("two mutants have one name")
    return mutants


if __name__ == "__main__":
    sys.exit(main())
