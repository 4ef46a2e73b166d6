"""Everything that is imported is declared: as a dependency, or as an extra that is imported where it is needed and no earlier."""

from __future__ import annotations

import ast
import re
import runpy
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {"marl_core", "marl_plugins"}
CALLED = {"yaml": "pyyaml"}
"""Packages that are installed by another name than they are imported by."""
BROUGHT = {"mlflow"}
"""Trackers that a user names and installs: asked only where one is in use."""
PARTS = {"pydantic_core": "pydantic"}
"""Packages that another one pins to the very version it needs: a bound of our own could only contradict it."""


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert found is not None
    return found.group().lower().replace("-", "_")


NEEDED = {name_of(line) for line in PROJECT["dependencies"]}
EXTRA = {name_of(line) for lines in PROJECT["optional-dependencies"].values() for line in lines} - NEEDED


def imported(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Top packages of all imports, with the line and whether it stands inside a function (or is for type checkers alone)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0], node.lineno, inside
        else:
            lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            lazy |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            yield from imported(node, inside or lazy)


def undeclared(tree: ast.AST, loaded_lazily: bool = False) -> list[tuple[str, int]]:
    """Imports that a plain installation may not have when they are made."""
    found = []
    for package, line, inside in imported(tree):
        name = PARTS.get(package, CALLED.get(package, package)).lower()
        if package in sys.stdlib_module_names or package in OURS or name in NEEDED:
            continue
        if not (name in EXTRA | BROUGHT and (inside or loaded_lazily)):
            found.append((package, line))
    return found


def at_the_top(sources: list[Any]) -> set[str]:
    """Modules of ours that another one imports as soon as it is imported itself."""
    found = set()
    for source in sources:
        for node in source.tree.body:
            if isinstance(node, ast.ImportFrom):
                found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_import_is_declared(core: list[Any], guests: list[Any]) -> None:
    early = at_the_top(core + guests)
    wrong = []
    for source in core + guests:
        module = source.path.removeprefix("plugins/").removesuffix(".py").replace("/", ".")
        wrong += [f"{source.path}:{line}: {package}" for package, line in undeclared(source.tree, module not in early)]
    assert not wrong


def test_every_dependency_has_a_lower_bound_and_a_version_that_is_tested() -> None:
    pinned = {
        name_of(line)
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    }
    assert pinned >= NEEDED
    lowest = runpy.run_path(str(ROOT / "tests" / "lowest" / "bounds.py"))
    bounds = {name.replace("-", "_"): version for name, version in lowest["bounds"]().items()}
    assert NEEDED - {"torch"} <= set(bounds)
    assert any(line.startswith("torch>=") for line in PROJECT["dependencies"])
    again = {name_of(line) for line in lowest["tools"](set(lowest["bounds"]()))}
    assert not again & set(bounds), "a package with a bound of its own is pinned to the newest, too"


def pins(text: str) -> dict[str, str]:
    """Versions by name, of lines of constraints."""
    lines = (line for line in text.splitlines() if "==" in line and not line.startswith("#"))
    return {name_of(line): line.partition("==")[2] for line in lines}


def test_what_is_brought_to_the_gpu_machine_is_what_the_suite_runs_with() -> None:
    """Its own torch and what goes with that are older; pyarrow and pyyaml it has in versions that only it can tell."""
    own, brought = (ROOT / "benchmarks/gpu/versions.txt").read_text(encoding="utf-8").split("# == brought ==")
    ours = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert {name: version for name, version in pins(brought).items() if ours.get(name, version) != version} == {}
    assert {"torch", "transformers"} <= set(pins(own))
    assert {*pins(own), *pins(brought), "pyarrow", "pyyaml"} >= NEEDED


def test_the_models_on_record_are_those_of_the_transformers_that_the_suite_runs_with() -> None:
    """tests/zoo compares with the record only there: whoever raises the version says so there, and runs `make zoo`."""
    pinned = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))["transformers"]
    assert f'RECORDED_WITH = "{pinned}"' in (ROOT / "tests/zoo/test_zoo.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("import numpy, json", []),
        ("import nobody.knows", ["nobody"]),
        ("def f():\n    from nobody import this", ["nobody"]),
        ("import bitsandbytes", ["bitsandbytes"]),
        ("def f():\n    import bitsandbytes", []),
        ("if TYPE_CHECKING:\n    import matplotlib", []),
        ("class A:\n    import matplotlib", ["matplotlib"]),
        ("import yaml, pydantic_core", []),
    ],
)
def test_the_rule_can_fail(code: str, wrong: list[str]) -> None:
    assert [package for package, _ in undeclared(ast.parse(code))] == wrong
