"""An answer within a time limit."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from marl_core import PluginError


def limited(function: Callable[[Any], Any], seconds: float | None, whose: str) -> Callable[[Any], Any]:
    """`function` of one argument, given up with a PluginError when it hasn't answered after `seconds`; None: no limit.

    It runs in a thread of its own, which nothing can end from outside: one that hangs stays until the process ends.
    """
    if seconds is None:
        return function

    @functools.wraps(function)
    def call(argument: Any) -> Any:
        answer: list[Any] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                answer.append(function(argument))
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=work, daemon=True, name=f"marl reward {whose}")
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            raise PluginError(
                f"reward.target: {whose} gave no answer within {seconds:g} seconds. It may wait for a server, or loop. Repair it, "
                "or raise reward.timeout_seconds."
            )
        if failure:
            raise failure[0]
        return answer[0]

    return call
