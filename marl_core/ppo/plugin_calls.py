"""Calls of plugins' functions, with errors that say whose they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from marl_core.errors import MarlError, PluginError, in_words
from marl_core.ppo.types import Rollout
from marl_core.registry.raised_from import origin_and_notes


def call(function: Callable[[Rollout], object], rollout: Rollout, who: str) -> object:
    """What a plugin's function says of a rollout, without gradient; whatever it raises is a PluginError that names it and the line."""
    try:
        with torch.no_grad():
            return function(rollout)
    except MarlError:
        raise
    except (Exception, SystemExit, GeneratorExit) as error:
        sentences = [
            f"{who} failed on a batch of {len(rollout)}: {type(error).__name__}: {error}".removesuffix("."),
            *(origin_and_notes(error, function) or [f"The traceback{in_words(' (--debug)', '')} shows where"]),
        ]
        raise PluginError(". ".join(sentences) + ".") from error


def describe(value: object) -> str:
    """A value's type, or a tensor's shape, for an error message."""
    if value is None:
        return "None"
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
