"""A model's decoder layers, told from the rest of its body."""

from __future__ import annotations

from torch import nn

from marl_core.errors import ConfigError


def decoder_layers(body: nn.Module, asked_by: str, instead: str) -> list[nn.Module]:
    """The one long ModuleList of the body; ConfigError when there is none, or more than one, naming the way out."""
    lists = [child for child in body.children() if isinstance(child, nn.ModuleList) and len(child)]
    if len(lists) != 1:
        raise ConfigError(
            f"{asked_by} needs a base whose decoder layers are one list; {type(body).__name__} has {len(lists)}. "
            f"Use {instead}."
        )
    return list(lists[0])
