"""The arrows of the design, section 3, as a table: who may import whom at run time. Type-checking imports are free."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import pytest

# lowest first; a storey may import itself and those before it
STOREYS = (
    "errors",
    "artifacts",
    "registry",
    "config",
    "plan",
    "bank",
    "ppo",
    "data",
    "parallel",
    "store",
    "safety",
    "report",
    "run",
    "testing",
    "cli",
)
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


def storey(module: str) -> str:
    """`marl_core/config/load.py` and `marl_core.config.load` as `config`, `marl_core/cli/tables.py` as `cli`."""
    return module.replace("/", ".").removesuffix(".py").split(".")[1]


def test_downwards_only(core: list[Any]) -> None:
    wrong = []
    for source in core:
        here = storey(source.path)
        if here == "__init__":
            continue
        for module, line in imports(source.tree):
            if module.startswith("marl_core.") and STOREYS.index(storey(module)) > STOREYS.index(here):
                wrong.append(f"{source.path}:{line}: {here} may not import {module}")
    assert not wrong


def test_every_file_has_a_storey(core: list[Any]) -> None:
    assert {storey(source.path) for source in core} <= {*STOREYS, "__init__"}


def test_the_core_imports_no_guest(core: list[Any]) -> None:
    wrong = [
        f"{source.path}:{line}"
        for source in core
        for module, line in imports(source.tree)
        if module.split(".")[0] in ("marl_plugins", "plugins", "tests", "examples")
    ]
    assert not wrong


def test_light_storeys_import_nothing_heavy_at_the_top(core: list[Any], guests: list[Any]) -> None:
    light = [source for source in core if storey(source.path) in LIGHT]
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


def named(source: Any) -> str:
    """A source file as a module."""
    return str(source.path).replace("/", ".").removesuffix(".py")


def test_no_cycles(core: list[Any]) -> None:
    """Of imports at the top of a module; one inside a function has already waited for both modules."""
    known = {named(source) for source in core}
    no_cycles(
        {
            named(source): {module for module, _ in imports(source.tree, top_only=True) if module in known}
            for source in core
        }
    )


SPEAKS_OF_ALL = ("marl_core.registry.hooks", "marl_core.registry.hookspecs")
"""Hooks have the types of the rooms that call them."""


def test_no_cycles_for_a_reader_of_the_light_rooms(core: list[Any]) -> None:
    """Nor of imports that are for type checkers alone."""
    light = {
        named(source): source
        for source in core
        if storey(source.path) in LIGHT and not source.path.endswith("__init__.py")
    }
    no_cycles(
        {
            name: {
                node.module
                for node in ast.walk(source.tree)
                if isinstance(node, ast.ImportFrom) and node.module in light and name not in SPEAKS_OF_ALL
            }
            for name, source in light.items()
        }
    )


def no_cycles(graph: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for below in graph[module]:
                visit(below, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_a_cycle_is_found() -> None:
    with pytest.raises(AssertionError, match="a -> b -> a"):
        no_cycles({"a": {"b"}, "b": {"a"}})


def test_the_rules_can_fail() -> None:
    tree = ast.parse(
        "if TYPE_CHECKING:\n    import torch\nimport peft\ndef f():\n    import trl\nclass A:\n    import numpy"
    )
    assert [module for module, _ in imports(tree)] == ["peft", "trl", "numpy"]
    assert [module for module, _ in imports(tree, top_only=True)] == ["peft", "numpy"]
    with pytest.raises(AssertionError):
        list(imports(ast.parse("from . import x")))
