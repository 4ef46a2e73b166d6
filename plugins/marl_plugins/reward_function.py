"""Calling a Python function as a reward, in the convention of TRL's reward functions."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from marl_core import ConfigError, callable_name
from marl_plugins.conversation import answered
from marl_plugins.function_target import load
from marl_plugins.time_limit import with_caller_state
from marl_plugins.user_code import STANDARD_ARGUMENTS, noting_origin

if TYPE_CHECKING:
    from marl_core import RewardFunction, Rollout


TRAINER_ARGUMENTS = ("trainer_state", "log_metric", "log_extra")
"""What TRL passes beside prompts, completions and columns: where the run is, and two ways to log."""
RESERVED_ARGUMENTS = {*STANDARD_ARGUMENTS, *TRAINER_ARGUMENTS}
NO_COLUMNS = {"prompt", *STANDARD_ARGUMENTS}
"""Columns of the data that no function is given: under these names stands what marl makes of a prompt, and the answer."""


def wrap(
    target: str | Callable[..., Any],
    arguments: Mapping[str, Any],
    more: Callable[[Rollout], Mapping[str, Any]] | None = None,
) -> RewardFunction:
    """A reward from a function or its name: prompts, completions, completion_ids, the data's columns and the trainer's, as TRL passes them.

    `more` gives further lists with an entry for each response.
    """
    function, name = load(target), callable_name(target)
    accepted, bound = _accepted(function), _bound(function)
    positional_only = [
        parameter.name for parameter in _parameters(function) if parameter.kind is inspect.Parameter.POSITIONAL_ONLY
    ]
    unknown = sorted(set(arguments) - accepted) if accepted is not None else []
    reserved = sorted(set(arguments) & RESERVED_ARGUMENTS)
    if unknown or reserved:
        raise ConfigError(
            f"reward.arguments: {name} can't be given {', '.join(unknown or reserved)}: "
            + (f"it takes {', '.join(sorted(accepted or ()))}." if unknown else "marl passes these itself.")
        )

    def score(rollout: Rollout) -> Any:
        extra = more(rollout) if more else {}
        of_data = columns(rollout)
        keywords = {**of_data, **extra, **_trainer_arguments(accepted)}
        takes = {key: value for key, value in keywords.items() if key not in bound} | dict(arguments)
        accepted_keywords = {key: value for key, value in takes.items() if accepted is None or key in accepted}
        given = accepted_keywords.keys() - {*arguments, *extra, *TRAINER_ARGUMENTS}
        chats = any(isinstance(completion, list) for completion in of_data["completions"])
        with noting_origin(function, given, of_data.keys() - {*STANDARD_ARGUMENTS, *arguments}, chats=chats):
            positional = [
                accepted_keywords.pop(name) for name in takewhile(accepted_keywords.__contains__, positional_only)
            ]
            result = function(*positional, **accepted_keywords)
            return _wait(result) if inspect.isawaitable(result) else result

    vars(score)["label"] = name  # errors name it
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
    names = {name for row in rollout.prompts.rows for name in row} - NO_COLUMNS
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


def _bound(function: Callable[..., Any]) -> set[str]:
    """Names that a partial has given a value already: a column of that name doesn't replace it."""
    return set(function.keywords) if isinstance(function, functools.partial) else set()


def _wait(awaitable: Any) -> Any:
    async def run() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(run())
    with ThreadPoolExecutor(1) as pool:  # a loop is running already, as in a notebook
        return pool.submit(with_caller_state(lambda: asyncio.run(run()))).result()
