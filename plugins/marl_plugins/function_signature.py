"""What a reward function asks for by its signature, and whether a run has it: from its source, which is parsed and not run."""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marl_core import callable_name, near_match
from marl_plugins.function_target import found_running, source_file
from marl_plugins.reward_function import NO_COLUMNS, RESERVED_ARGUMENTS

if TYPE_CHECKING:
    from marl_core import Plan, Strategy


def missing_columns(
    strategy: Strategy,
    target: str | Callable[..., Any],
    arguments: Mapping[str, Any],
    plan: Plan,
    more: Iterable[str] = (),
) -> Iterable[str]:
    """A sentence for each argument that the function requires and neither the data nor `arguments` nor marl give it.

    `more`: what this kind of reward passes beside the usual.
    """
    required = _required(target)
    if required is None:
        return
    given = {*RESERVED_ARGUMENTS, *more, *arguments}
    is_judge = any(strategy is judge for _, judge in plan.judges.values())
    for key, columns in plan.data_columns.items():
        if is_judge and key != "eval.prompts":
            continue
        of_data = columns - NO_COLUMNS
        for name in required:
            if name in given or name in of_data:
                continue
            near = near_match(name, {*of_data, *given})
            yield (
                f"reward.target: {callable_name(target)} requires {name!r}, and {key} has no such column; it has "
                f"{', '.join(sorted(of_data)) or 'none beside the prompt'}. "
                f"{f'Did you mean {near!r}?' if near else f'Add the column, give it in reward.arguments, or give {name} a default'}"
            )


def _required(target: str | Callable[..., Any]) -> list[str] | None:
    """The arguments without a default. None where it can't be told: it is a class, is decorated, or is made by other lines than a `def`."""
    if not isinstance(target, str):
        return _of_object(target)
    location, name = target.rsplit(":", 1)
    running = found_running(location, name)
    if running is not None:
        return _of_object(running)
    file = source_file(location)
    return None if file is None or not os.path.isfile(file) else _of_source(Path(file), name)


def _of_object(function: Any) -> list[str] | None:
    if inspect.isclass(function):
        return None
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        parameter.name
        for parameter in parameters
        if parameter.kind not in variable and parameter.default is inspect.Parameter.empty
    ]


def _of_source(file: Path, name: str) -> list[str] | None:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    bound = [node for node in ast.walk(tree) if _binds(node, name)]
    if len(bound) != 1 or bound[0] not in tree.body:
        return None
    (definition,) = bound
    if not isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef) or definition.decorator_list:
        return None
    arguments = definition.args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    by_name = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    required = positional[: len(positional) - len(arguments.defaults)]
    return required + [argument.arg for argument, default in by_name if default is None]


def _binds(node: ast.AST, name: str) -> bool:
    """Whether a line gives the name something to stand for."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name == name
    if isinstance(node, ast.alias):
        return (node.asname or node.name) in (name, "*")
    return isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store)
