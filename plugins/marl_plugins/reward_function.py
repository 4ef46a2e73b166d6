"""Calling a Python function as a reward, in the convention of TRL's reward functions."""

from __future__ import annotations

import ast
import asyncio
import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marl_core import ConfigError, PluginError, near_match
from marl_plugins.conversation import answered
from marl_plugins.time_limit import with_caller_state
from marl_plugins.user_code import noting_origin, raised_from

if TYPE_CHECKING:
    from marl_core import RewardFunction, Rollout


TRAINER_ARGUMENTS = ("trainer_state", "log_metric", "log_extra")
"""What TRL passes beside prompts, completions and columns: where the run is, and two ways to log."""
RESERVED_ARGUMENTS = {"prompts", "completions", "completion_ids", *TRAINER_ARGUMENTS}


def problems(target: str) -> Iterable[str]:
    """Why `target` can't be imported, found without importing it."""
    location, name = target.rsplit(":", 1)
    if location.endswith(".py"):
        file = Path(os.path.expanduser(location))
        if not os.path.isfile(file):
            yield f"reward.target: there is no file {location!r} (looked in {Path.cwd()}){_near_file(file)}"
            return
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError) as error:
            yield f"reward.target: {location} is not Python: {error}"
            return
        names = _defined(tree)
        computed = any(isinstance(node, ast.If | ast.Try | ast.For | ast.With | ast.AnnAssign) for node in tree.body)
        if name not in names and not computed and "*" not in names:
            near = near_match(name, names)
            hint = f". Did you mean {near!r}?" if near else ""
            yield f"reward.target: {location} defines no {name!r}; it defines {', '.join(sorted(names)) or 'nothing'}{hint}"
    elif not _module_exists(location):
        yield f"reward.target: there is no module {location!r} in this environment; for a file write {location}.py:{name}"


def _near_file(file: Path) -> str:
    """The Python file beside a missing one that may be meant, as the end of a sentence."""
    near = near_match(file.name, (other.name for other in file.parent.glob("*.py")))
    return f". Did you mean {str(file.with_name(near))!r}?" if near else ""


def _defined(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def _module_exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module.split(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def load(target: str) -> Callable[..., Any]:
    """Import the function; ConfigError when it isn't there, PluginError when its module fails."""
    location, name = target.rsplit(":", 1)
    try:
        module = (
            _load_file(Path(os.path.expanduser(location)))
            if location.endswith(".py")
            else importlib.import_module(location)
        )
    except FileNotFoundError as error:
        raise ConfigError(f"reward.target: there is no file {location!r} (looked in {Path.cwd()}).") from error
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"reward.target: {location} could not be imported: {type(error).__name__}: {error}. {raised_from(error)}".rstrip()
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"reward.target: {location} has no function {name!r}.")
    return _instance(function, target) if inspect.isclass(function) else function


def _instance(function_class: type, target: str) -> Callable[..., Any]:
    """An instance of a class, which is the reward function."""
    try:
        instance: Callable[..., Any] = function_class()
    except Exception as error:
        raise ConfigError(
            f"reward.target: {target} is a class, and can't be made without arguments ({error}). Make an instance in that module, "
            "and name it."
        ) from error
    if not callable(instance):
        raise ConfigError(
            f"reward.target: {target} is a class without __call__; a reward is a function or a callable instance."
        )
    return instance


def _load_file(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(file)
    name = f"marl_reward_{abs(hash(file.resolve())):x}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} can't be loaded as a module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def wrap(
    target: str, arguments: Mapping[str, Any], more: Callable[[Rollout], Mapping[str, Any]] | None = None
) -> RewardFunction:
    """A reward from a function: prompts, completions, completion_ids, the data's columns and the trainer's, as TRL passes them.

    `more` gives further lists with an entry for each response.
    """
    function = load(target)
    accepted = _accepted(function)
    positional_only = [
        parameter.name for parameter in _parameters(function) if parameter.kind is inspect.Parameter.POSITIONAL_ONLY
    ]
    unknown = sorted(set(arguments) - accepted) if accepted is not None else []
    reserved = sorted(set(arguments) & RESERVED_ARGUMENTS)
    if unknown or reserved:
        raise ConfigError(
            f"reward.arguments: {target} can't be given {', '.join(unknown or reserved)}: "
            + (f"it takes {', '.join(sorted(accepted or ()))}." if unknown else "marl passes these itself.")
        )

    def score(rollout: Rollout) -> Any:
        extra = more(rollout) if more else {}
        keywords = {**columns(rollout), **extra, **arguments, **_trainer_arguments(accepted)}
        accepted_keywords = {key: value for key, value in keywords.items() if accepted is None or key in accepted}
        with noting_origin(function, accepted_keywords.keys() - {*arguments, *extra, *TRAINER_ARGUMENTS}):
            positional = [
                accepted_keywords.pop(name) for name in takewhile(accepted_keywords.__contains__, positional_only)
            ]
            result = function(*positional, **accepted_keywords)
            return _wait(result) if inspect.isawaitable(result) else result

    vars(score)["label"] = target  # errors name it
    return score


def _trainer_arguments(accepted: set[str] | None) -> dict[str, Any]:
    """TRL's further arguments, where the function takes them."""
    if accepted is not None and accepted.isdisjoint(TRAINER_ARGUMENTS):
        return {}
    from transformers import TrainerState

    from marl_core import reward_context

    context = reward_context()
    state = TrainerState(
        global_step=context.step,
        max_steps=context.steps,
        epoch=context.epoch,
        num_train_epochs=math.ceil(context.epochs),
        is_local_process_zero=context.first,
        is_world_process_zero=context.first,
    )
    return dict(zip(TRAINER_ARGUMENTS, (state, context.log_metric, context.log_extra), strict=True))


def columns(rollout: Rollout) -> dict[str, Any]:
    """Keyword arguments of a reward function: each a list with one entry for each response.

    An answer that a chat's own assistant message began is one completion, and its prompt ends before it.
    """
    prompts, completions = list(rollout.prompts.texts), list[Any](rollout.texts)
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            prompts[index], answer = answered(prompt, completions[index])
            completions[index] = [answer]
    ids = [row[keep].tolist() for row, keep in zip(rollout.ids, rollout.mask, strict=True)]
    names = {name for row in rollout.prompts.rows for name in row} - {
        "prompt",
        "prompts",
        "completions",
        "completion_ids",
    }
    extra = {name: [row.get(name) for row in rollout.prompts.rows] for name in sorted(names)}
    return {"prompts": prompts, "completions": completions, "completion_ids": ids, **extra}


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """What the function says it takes; anything by name where it says nothing, as some built in C."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]


def _accepted(function: Callable[..., Any]) -> set[str] | None:
    """Names the function takes; None when it takes any."""
    parameters = _parameters(function)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_POSITIONAL}


def _wait(awaitable: Any) -> Any:
    async def run() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(run())
    with ThreadPoolExecutor(1) as pool:  # a loop is running already, as in a notebook
        return pool.submit(with_caller_state(lambda: asyncio.run(run()))).result()
