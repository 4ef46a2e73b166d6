"""Calls in another thread: with the caller's thread state, and within a time limit."""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Callable
from typing import Any

from marl_core import PluginError


def with_caller_state(function: Callable[[], Any]) -> Callable[[], Any]:
    """`function` to call in another thread with this one's state: torch's gradient and inference mode, which are kept by thread, and
    context variables.
    """
    import torch

    gradients, inference, context = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        contextvars.copy_context(),
    )

    def call() -> Any:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return context.run(function)

    return call


def limited(function: Callable[[Any], Any], seconds: float | None, label: str) -> Callable[[Any], Any]:
    """`function` of one argument, given up with a PluginError when it hasn't answered after `seconds`; None: no limit.

    It runs in a thread of its own, which nothing can end from outside: one that hangs stays until the process ends.
    """
    if seconds is None:
        return function

    @functools.wraps(function)
    def call(argument: Any) -> Any:
        answer: list[Any] = []
        failure: list[BaseException] = []

        in_caller_state = with_caller_state(lambda: function(argument))

        def work() -> None:
            try:
                answer.append(in_caller_state())
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=work, daemon=True, name=f"marl reward {label}")
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            raise PluginError(
                f"reward.target: {label} gave no answer within {seconds:g} seconds. It may wait for a server, or loop. Repair it, "
                "or raise reward.timeout_seconds."
            )
        if failure:
            raise failure[0]
        return answer[0]

    return call
