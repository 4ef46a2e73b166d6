"""Calls of plugins' functions, with errors that say whose they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from marl_core.errors import MarlError, PluginError, Stopped, in_words, near_match
from marl_core.ppo.types import Rollout
from marl_core.registry.raised_from import origin_and_notes, say_origin


def call(function: Callable[[Rollout], object], rollout: Rollout, who: str) -> object:
    """What a plugin's function says of a rollout, without gradient; whatever it raises is a PluginError that names it and the line."""
    try:
        with torch.no_grad():
            return function(rollout)
    except Stopped:
        raise
    except MarlError as error:
        say_origin(error, who, function)
        raise
    except (Exception, SystemExit, GeneratorExit) as error:
        sentences = [
            f"{who} failed on a batch of {len(rollout)}: {type(error).__name__}: {error}".removesuffix("."),
            *(origin_and_notes(error, function) or [f"The traceback{in_words(' (--debug)', '')} shows where"]),
            *_columns_sentence(error, rollout),
        ]
        raise PluginError(". ".join(sentences) + ".") from error


def _columns_sentence(error: BaseException, rollout: Rollout) -> list[str]:
    """The data's columns, for a missing key that is none of them; nothing where notes on the error have told them."""
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    columns = list(dict.fromkeys(str(name) for row in rollout.prompts.rows for name in row))
    if not isinstance(key, str) or key in columns or getattr(error, "__notes__", None):
        return []
    near = near_match(key, columns)
    meant = f". Did you mean {near!r}?" if near else ""
    return [f"The data's columns (rollout.prompts.rows) are: {', '.join(columns) or 'none'}{meant}"]


def describe(value: object) -> str:
    """A value's type, or a tensor's shape, for an error message."""
    if value is None:
        return "None"
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
