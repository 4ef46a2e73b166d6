"""docs/upstream.md names each test of tests/upstream once and no other, and files that are there; counts of cases are right."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UPSTREAM = ROOT / "tests" / "upstream"
COUNTED = {"a": "[1, 2]", "b": "{'x': 1, 'y': 2, 'z': 3}", "c": "range(1, N)", "d": "[*A, 1]", "e": "A + A"}


def test_every_upstream_test_has_its_row() -> None:
    named = re.findall(r"`(test_\w+\.py::test_\w+)`", (ROOT / "docs/upstream.md").read_text(encoding="utf-8"))
    there = [
        f"{file.name}::{node.name}"
        for file in UPSTREAM.glob("test_*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert sorted(named) == sorted(there)


def test_every_guard_is_there() -> None:
    page = (ROOT / "docs/upstream.md").read_text(encoding="utf-8").replace("`marl_plugins/", "`plugins/marl_plugins/")
    tests = "".join(file.read_text(encoding="utf-8") for file in UPSTREAM.glob("test_*.py"))
    guards = {*re.findall(r'"((?:marl_core|plugins)/[\w/]+\.py)"', tests)}
    assert guards
    assert [guard for guard in guards if not (ROOT / guard).is_file() or f"`{guard}`" not in page] == []


@pytest.mark.parametrize(("source", "number"), list(zip(COUNTED.values(), (2, 3, 3, 3, 4), strict=True)), ids=COUNTED)
def test_cases_are_counted(source: str, number: int) -> None:
    items = runpy.run_path(str(ROOT / "docs/make_reliability_table.py"))["items"]
    constants = {"N": ast.parse("4", mode="eval").body, "A": ast.parse("[1, 2]", mode="eval").body}
    assert len(items(ast.parse(source, mode="eval").body, constants)) == number
