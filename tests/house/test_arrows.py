"""The arrows of the house: who may import whom, imports for type checkers included. Order and picture: docs/make_architecture.py."""

from __future__ import annotations

import ast
import runpy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

HOUSE: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "make_architecture.py"))
ROOMS = list(HOUSE["ROOMS"])
LIGHT = ("errors", "artifacts", "registry", "config", "plan", "cli", "__init__")
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "trl",
    "datasets",
    "numpy",
    "accelerate",
    "safetensors",
    "matplotlib",
)
GUEST_MAY = ("marl_core", "marl_core.ppo", "marl_core.testing", "marl_plugins")
"""What docs/api.md lists, and the guests' own package."""


def imports(tree: ast.AST, top_only: bool = False) -> Iterator[tuple[str, int]]:
    """Modules imported at run time, with the line; `top_only` leaves out those inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield node.module or "", node.lineno
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from (found for branch in node.orelse for found in imports(branch, top_only))
        elif not (top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports(node, top_only)


def room(path: str) -> str:
    """`marl_core/config/load.py` as `config`."""
    return path.replace("/", ".").removesuffix(".py").split(".")[1]


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, however long the way round."""
    done: set[str] = set()
    found: list[list[str]] = []

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append([*trail[trail.index(module) :], module])
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def test_downwards_only() -> None:
    wrong = [
        f"{module} may not import {target}"
        for module, targets in HOUSE["graph"]().items()
        for target in targets
        if ROOMS.index(HOUSE["room"](target)) < ROOMS.index(HOUSE["room"](module))
    ]
    assert not wrong


def test_no_circles() -> None:
    """Of any imports: at the top, inside functions, for type checkers."""
    assert circles(HOUSE["graph"]()) == []


def test_every_file_has_a_room(core: list[Any]) -> None:
    assert {room(source.path) for source in core} == {*ROOMS, "__init__"}


def test_only_the_contract_names_what_is_further_up(core: list[Any]) -> None:
    """And it does so for type checkers alone."""
    contract = [
        source
        for source in core
        if source.path.removeprefix("marl_core/").removesuffix(".py").replace("/", ".") in HOUSE["CONTRACT"]
    ]
    assert len(contract) == len(HOUSE["CONTRACT"])
    wrong = [
        f"{source.path}:{line}: {module}"
        for source in contract
        for module, line in imports(source.tree)
        if module.startswith("marl_core.") and ROOMS.index(room(module)) < ROOMS.index("registry")
    ]
    assert not wrong


def test_the_core_imports_no_guest(core: list[Any]) -> None:
    wrong = [
        f"{source.path}:{line}"
        for source in core
        for module, line in imports(source.tree)
        if module.split(".")[0] in ("marl_plugins", "plugins", "tests", "examples")
    ]
    assert not wrong


def test_light_rooms_import_nothing_heavy_at_the_top(core: list[Any], guests: list[Any]) -> None:
    light = [source for source in core if room(source.path) in LIGHT]
    wrong = [
        f"{source.path}:{line}: {module}"
        for source in light
        for module, line in imports(source.tree, top_only=True)
        if module.split(".")[0] in HEAVY
    ]
    assert not wrong


def test_guests_use_public_names_only(guests: list[Any]) -> None:
    wrong = [
        f"{source.path}:{line}: {module}"
        for source in guests
        for module, line in imports(source.tree)
        if module.startswith(("marl_core", "marl_plugins"))
        and module not in GUEST_MAY
        and not module.startswith("marl_plugins.")
    ]
    assert not wrong


def test_the_rules_can_fail() -> None:
    tree = ast.parse(
        "if TYPE_CHECKING:\n    import torch\nimport peft\ndef f():\n    import trl\nclass A:\n    import numpy"
    )
    assert [module for module, _ in imports(tree)] == ["peft", "trl", "numpy"]
    assert [module for module, _ in imports(tree, top_only=True)] == ["peft", "numpy"]
    with pytest.raises(AssertionError):
        list(imports(ast.parse("from . import x")))
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c", "a"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_imports_for_type_checkers_and_inside_functions_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        "if TYPE_CHECKING:\n    from marl_core.run import runner\ndef f():\n    import marl_core.plan.plan\n",
        encoding="utf-8",
    )
    known = {"run.runner": file, "plan.plan": file}
    assert sorted(HOUSE["imports"](file, known)) == ["plan.plan", "run.runner"]
