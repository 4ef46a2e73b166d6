"""Section: what all sections of a config have in common. Strict types, no unknown keys, finite numbers."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from marl_core.config.choice import chosen_field
from marl_core.registry.deprecation import warn_options
from marl_core.registry.families import family_keys

UnitInterval = Annotated[float, Field(ge=0.0, le=1.0)]
BY_RECORD: Any = None
"""Stands for the default of a key that names strategies, which its family's record says."""


class Section(BaseModel):
    """Base of all sections.

    One that says where it stands (`class PPOSection(Section, at="ppo")`) has every key that the records of registry/families.py
    place there, with type, default and description as they say. Those that the core reads itself are written out in the class for
    the sake of type checkers and of their place among the others; what is written there is nothing but that.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_by_name=True,
        use_attribute_docstrings=True,
    )

    def __init_subclass__(cls, at: str | None = None, **more: Any) -> None:
        """Give a section at `at` (dotted; empty for the config itself) its keys that name strategies. pydantic reads them next."""
        super().__init_subclass__(**more)
        inherited = cls.model_fields
        for family, key in family_keys():
            if key.section == at and key.name not in inherited:
                cls.__annotations__[key.name], field = chosen_field(family, key)
                setattr(cls, key.name, field)

    @classmethod
    def long_form(cls, value: Any) -> Any:
        """A short way of writing this section as the mapping it stands for; anything else as it is."""
        return value

    @model_validator(mode="after")
    def _say_what_is_deprecated(self) -> Self:
        warn_options(self, f"{type(self).__name__.removesuffix('Section').lower()}.")
        return self
