"""Rules that grep can hold: who switches adapters, and that no code asks for a strategy by its name."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest

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


OF_PEFT = ("marl_core/artifacts/", "marl_core/plan/adapter_checks.py")
"""Where files are read that PEFT wrote: a kind of adapter has there the name that PEFT gave it, whoever offers a strategy of that name."""


def strategy_names(without: str = "") -> set[str]:
    points = metadata.distribution("marl-core").entry_points
    return {point.name for point in points if point.group.startswith("marl.") and point.group != without}


KEYS = ("model.shard", "value.on", "value_on", "bias", "written", "kind.merge")
"""What is compared with such a word and is no strategy: keys whose own values these are, peft's `bias`, how a kind merges, a file's
sections."""


def asks_by_name(tree: ast.AST, names: set[str]) -> list[int]:
    """Lines that compare anything but KEYS with a strategy's name, or look it up in a table of them.

    A local variable stands for what it was assigned; what can't be traced, such as an argument, counts as asking.
    """
    found = []
    for scope in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))]:
        known = _assigned(scope)
        for node in _own_nodes(scope):
            asked: list[ast.expr] = []
            if isinstance(node, ast.Compare):
                asked = [node.left, *node.comparators]
            elif isinstance(node, ast.Match):
                asked = [node.subject, *(part for part in ast.walk(node) if isinstance(part, ast.Constant))]
            elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
                asked = [node.slice, *(key for key in node.value.keys if key is not None)]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                if isinstance(node.func.value, ast.Dict):
                    asked = [node.args[0], *(key for key in node.func.value.keys if key is not None)]
                elif node.func.attr in ("startswith", "endswith", "__eq__"):
                    asked = [node.func.value, *node.args]
            texts = {part.value for side in asked for part in ast.walk(side) if isinstance(part, ast.Constant)}
            subjects = [side for side in asked if any(isinstance(part, ast.Name) for part in ast.walk(side))]
            if texts & names and not all(_is_key(side, known) for side in subjects):
                found.append(getattr(node, "lineno", 0))
    return sorted(set(found))


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """All below it but for what stands in functions inside."""
    for node in ast.iter_child_nodes(scope):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _own_nodes(node)


def _assigned(scope: ast.AST) -> dict[str, list[ast.expr]]:
    """What each local name was assigned, one by one in tuples."""
    found: dict[str, list[ast.expr]] = defaultdict(list)
    for node in _own_nodes(scope):
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            pairs = [(node.target, node.value)]
        else:
            continue
        for target, value in pairs:
            both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            many = zip(target.elts, value.elts, strict=False) if both else [(target, value)]  # type: ignore[attr-defined]
            for one, given in many:
                if isinstance(one, ast.Name):
                    found[one.id].append(given)
    return found


def _is_key(side: ast.expr, known: dict[str, list[ast.expr]], depth: int = 0) -> bool:
    if isinstance(side, ast.Name) and side.id in known and depth < 5:
        return all(_is_key(value, known, depth + 1) for value in known[side.id])
    text = ast.unparse(side)
    return any(text == key or text.endswith("." + key) for key in KEYS) or "get('bias'" in text


def test_no_code_asks_for_a_strategy_by_its_name(core: list[Any]) -> None:
    wrong = [
        f"{source.path}:{line}"
        for source in core
        for line in asks_by_name(
            source.tree, strategy_names(without="marl.adapter" if source.path.startswith(OF_PEFT) else "")
        )
    ]
    assert not wrong


NAMED_IN = {
    "marl_core/registry/families.py": ("with_folder=", "on_command_line="),
    "marl_core/artifacts/kind_table.py": ("FOUR_BIT, EIGHT_BIT =",),
}
"""The lines of the core that may name strategies, by how they begin."""


def test_a_strategys_name_stands_nowhere_else_in_the_core(core: list[Any]) -> None:
    """Names with a dash can't be anything else; the members that a family's record says are always there are the exception."""
    names = {name for name in strategy_names() if "-" in name}
    wrong = [
        f"{source.path}:{node.lineno}: {node.value!r}"
        for source in core
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Constant) and node.value in names
        if not source.text.splitlines()[node.lineno - 1].strip().startswith(NAMED_IN.get(source.path, ()))
    ]
    assert not wrong


@pytest.mark.parametrize(
    "code",
    [
        "if choice.use == 'function': pass",
        "if x.label in ('model', 'a'): pass",
        "kind = config.quantization.label\nif kind != 'function': pass",
        "def f(config):\n    shard, how = config.model.shard, config.quantization.label\n    return shard or how != 'function'",
        "def f(q):\n    one = q.label\n    two = one\n    return two == 'model'",
        "def f(label):\n    return label == 'model'",
        "if (found := choice.use) == 'model': pass",
        "match choice.use:\n    case 'model': pass",
        "x = {'model': 1}[choice.label]",
        "x = {'model': 1}.get(choice.label)",
        "if choice.label.startswith('model'): pass",
    ],
)
def test_the_rule_can_fail(code: str) -> None:
    assert asks_by_name(ast.parse(code), {"function", "model"})


@pytest.mark.parametrize(
    "code",
    [
        "if config.model.shard != 'none': pass",
        "def f(plan):\n    where = plan.value_on\n    return where == 'none'",
        "def f(self):\n    on, label = self.value.on, self.ppo.advantage.label\n    return on == 'none'",
        "if x.label == 'something': pass",
    ],
)
def test_keys_of_the_config_may_have_such_values(code: str) -> None:
    assert asks_by_name(ast.parse(code), {"none", "model"}) == []
