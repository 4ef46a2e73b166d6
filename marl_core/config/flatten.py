"""Nested values as one table with dotted keys, as configs are compared, shown and told to trackers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(value: Any, place: str = "") -> dict[str, Any]:
    """Nested plain values under dotted keys: `{"ppo": {"kl": {"coef": 0.1}}}` as `{"ppo.kl.coef": 0.1}`.

    Entries of a list count from 0 (`reward.0.use`), but a list of texts and numbers stays one value, as does what is empty.
    """
    if isinstance(value, Mapping) and value:
        children = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, list) and any(isinstance(part, Mapping | list) for part in value):
        children = [(str(index), part) for index, part in enumerate(value)]
    else:
        return {place: value}
    prefix = f"{place}." if place else ""
    return {path: leaf for key, part in children for path, leaf in flatten(part, prefix + key).items()}
