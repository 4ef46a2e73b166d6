"""Rules that grep can hold: who switches adapters, and that no code asks for a strategy by its name."""

from __future__ import annotations

import ast
from importlib import metadata
from typing import Any

SWITCHES = {
    "set_adapter",
    "disable_adapter",
    "enable_adapters",
    "disable_adapters",
    "set_requires_grad",
    "disable_adapter_layers",
}


def test_only_the_bank_switches_adapters(core: list[Any], guests: list[Any]) -> None:
    wrong = [
        f"{source.path}:{node.lineno}: {node.attr}"
        for source in core + guests
        if not source.path.startswith("marl_core/bank/")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and node.attr in SWITCHES
    ]
    assert not wrong


def strategy_names() -> set[str]:
    points = metadata.distribution("marl-core").entry_points
    return {point.name for point in points if point.group.startswith("marl.")}


def asks_by_name(tree: ast.AST, names: set[str]) -> list[int]:
    """Lines that compare something called use, label, name or strategy with a strategy's name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            texts = {
                part.value
                for side in sides
                for part in ast.walk(side)
                if isinstance(part, ast.Constant) and part.value in names
            }
            subjects = " ".join(ast.unparse(side) for side in sides if not isinstance(side, ast.Constant))
            if texts and any(word in subjects for word in ("use", "label", "name", "strategy", "kind", "choice")):
                found.append(node.lineno)
        elif isinstance(node, ast.Match):
            values = {
                part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)
            }
            if values & names:
                found.append(node.lineno)
    return found


def test_no_code_asks_for_a_strategy_by_its_name(core: list[Any]) -> None:
    wrong = [f"{source.path}:{line}" for source in core for line in asks_by_name(source.tree, strategy_names())]
    assert not wrong


def test_a_strategys_name_stands_nowhere_else_in_the_core(core: list[Any]) -> None:
    """Names with a dash can't be anything else; the observers that the command line adds are the one exception."""
    names = {name for name in strategy_names() if "-" in name}
    wrong = [
        f"{source.path}:{node.lineno}: {node.value!r}"
        for source in core
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Constant) and node.value in names
        if not (
            source.path == "marl_core/cli.py" and source.text.splitlines()[node.lineno - 1].startswith("OBSERVERS =")
        )
    ]
    assert not wrong


def test_the_rule_can_fail() -> None:
    bad = ast.parse(
        "if choice.use == 'function': pass\nif x.label in ('model', 'a'): pass\nif value_on == 'none': pass"
    )
    assert asks_by_name(bad, {"function", "model"}) == [1, 2]
