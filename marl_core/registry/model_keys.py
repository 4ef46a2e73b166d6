"""The keys of pydantic models, and the way to one of them through sections, lists and names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

KeyPath = tuple[str | int, ...]
"""Keys, list indices and names on the way to a value: `("reward", 0, "weight")`."""


def dotted(path: KeyPath) -> str:
    """`("reward", 0, "weight")` as `reward.0.weight`."""
    return ".".join(str(part) for part in path)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """All models inside an annotation such as `list[RewardChoice]`, `dict[str, RewardChoice]` or `DataSection | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return iter([annotation])
    return iter([model for part in get_args(annotation) for model in models_in(part)])


def keys_of(model: type[BaseModel]) -> list[str]:
    """The keys of a model as a config writes them (`from`, not `source`)."""
    return [field.alias or name for name, field in model.model_fields.items()]


def field_named(model: type[BaseModel], key: str) -> FieldInfo | None:
    """A model's field by its name, or by its name in a config (`from`)."""
    fields = model.model_fields
    return fields.get(key) or next((field for field in fields.values() if field.alias == key), None)
