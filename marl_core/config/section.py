"""Section: what all sections of a config have in common. Strict types, no unknown keys, finite numbers."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from marl_core.registry.deprecation import warn_options

UnitInterval = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_by_name=True,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="after")
    def _say_what_is_deprecated(self) -> Self:
        warn_options(self, f"{type(self).__name__.removesuffix('Section').lower()}.")
        return self
