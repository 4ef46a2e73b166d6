"""What an adapter's targets mean among the names of a model's layers: the same for `marl check` and for the run."""

from __future__ import annotations

import re
from collections.abc import Iterable

from marl_core.errors import ConfigError

ALL_LINEAR = "all-linear"


def is_called(name: str, target: str) -> bool:
    """Whether a layer's full name is a target, or ends with it: `model.layers.0.mlp.up_proj` is called `up_proj` and `mlp.up_proj`."""
    return name == target or name.endswith("." + target)


def matches(targets: str | Iterable[str], name: str) -> bool:
    """Whether a layer is among the targets: a list of names, one name, a regular expression for the whole name, or `all-linear`.

    ConfigError for a text that is no regular expression.
    """
    if not isinstance(targets, str):
        return any(is_called(name, target) for target in targets)
    if targets == ALL_LINEAR or is_called(name, targets):
        return True
    try:
        return re.fullmatch(targets, name) is not None
    except re.error as error:
        raise ConfigError(
            f"LoRA targets {targets!r} is neither a module name nor a regular expression: {error}."
        ) from error


def unmatched(targets: str | Iterable[str], names: Iterable[str]) -> list[str]:
    """The targets that name no layer among `names`, each once, in their order; ConfigError as in `matches`."""
    layers = list(names)
    if isinstance(targets, str):
        return [] if any(matches(targets, name) for name in layers) else [targets]
    return [target for target in dict.fromkeys(targets) if not any(is_called(name, target) for name in layers)]
