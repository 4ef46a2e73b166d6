"""Section: what all sections of a config have in common. Strict types, no unknown keys, finite numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeAlias

from pydantic import ConfigDict, Field, ValidationError, model_validator

from marl_core.config.choice import chosen_field
from marl_core.config.validation_messages import problem_lines
from marl_core.registry.deprecation import warn_deprecated, warn_options
from marl_core.registry.families import family_keys
from marl_core.registry.model_keys import keys_of
from marl_core.registry.problems import PlainlyTold, suggestion, told

UnitInterval = Annotated[float, Field(ge=0.0, le=1.0)]
Renamed: TypeAlias = Mapping[str, tuple[str, str]]
"""Old keys of a section: the new name of each, and the version that deprecated the old one."""
FROM_FAMILY_RECORD: Any = None
"""Placeholder for the default of a key that names strategies: the real one is in its family's record (registry/families.py)."""


class Section(PlainlyTold):
    """Base of all sections.

    A section that gives its path (`class PPOSection(Section, at="ppo")`) gets every key that the records of registry/families.py
    name at that path, with the record's type, default and description. A class repeats such a key (`= FROM_FAMILY_RECORD`) only for
    type checkers and for the order of the keys. A section may be a choice of a strategy itself (`class PolicySection(Section, Choice)`):
    then its keys stand beside the strategy's options.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_by_name=True,
        use_attribute_docstrings=True,
    )

    renamed: ClassVar[Renamed] = {}
    place: ClassVar[str | None] = None
    """Where it stands in a config (`ppo.kl`); empty for the config itself, None for a part of sections."""

    @model_validator(mode="before")
    @classmethod
    def _read_old_keys(cls, written: Any) -> Any:
        """Old keys under their new names, with a warning."""
        old = [key for key in cls.renamed if key in written] if isinstance(written, Mapping) else []
        if not old:
            return written
        result = dict(written)
        for key in old:
            new, since = cls.renamed[key]
            if new in result:
                raise ValueError(f"{key} is the old name of {new}, and both are given; remove {key}")
            warn_deprecated(f"{cls._prefix()}{key}", f"{cls._prefix()}{new}", since)
            result[new] = result.pop(key)
        return result

    def __init_subclass__(cls, at: str | None = None, **more: Any) -> None:
        """Add the keys that name strategies to the section at path `at` (dotted; empty for the config itself), before pydantic reads it."""
        super().__init_subclass__(**more)
        cls.place = at
        inherited = cls.model_fields
        for family, key in family_keys():
            is_a_section = vars(cls).get(key.name, FROM_FAMILY_RECORD) is not FROM_FAMILY_RECORD
            if key.section == at and key.name not in inherited and not is_a_section:
                cls.__annotations__[key.name], field = chosen_field(family, key)
                setattr(cls, key.name, field)

    @classmethod
    def long_form(cls, value: Any) -> Any:
        """A short way of writing this section as the mapping it stands for; anything else as it is."""
        return value

    @classmethod
    def _told(cls, error: ValidationError, given: Mapping[str, Any]) -> str:
        return told(cls.__name__, problem_lines(error, given, cls).values())

    @classmethod
    def _told_unnamed(cls, unnamed: tuple[Any, ...]) -> str:
        what = "sections" if cls.place == "" else "keys"
        file = ", or load_config(FILE) for a YAML file" if cls.place == "" else ""
        return f"{cls.__name__}: give {what} by name: {cls.__name__}(**mapping){file}."

    @classmethod
    def _told_fixed(cls, name: str, value: Any) -> str:
        key = f"{cls.place}.{name}" if cls.place else name
        if name not in cls.model_fields:
            return f"{key}: there is no such key. {suggestion(name, keys_of(cls))}"
        return f"{key}: a config doesn't change. config.with_changes({key!r}, {value!r:.60}) gives a new one."

    @model_validator(mode="after")
    def _say_what_is_deprecated(self) -> Self:
        warn_options(self, self._prefix())
        return self

    if not TYPE_CHECKING:  # to a type checker an old name is an error

        def __getattr__(self, name: str) -> Any:
            """An old key's value, with a warning."""
            if name not in type(self).renamed:
                return super().__getattr__(name)
            new, since = type(self).renamed[name]
            warn_deprecated(f"{self._prefix()}{name}", f"{self._prefix()}{new}", since)
            return getattr(self, new)

    @classmethod
    def _prefix(cls) -> str:
        """What stands before a key of this section in messages: `speed.`."""
        return f"{cls.__name__.removesuffix('Section').lower()}."

    def old_keys(self, prefix: str = "") -> dict[str, str]:
        """Old names of keys, of this section and of those in it, with their new names; dotted, each with `prefix` before it."""
        keys = {f"{prefix}{old}": f"{prefix}{new}" for old, (new, _) in self.renamed.items()}
        for name in type(self).model_fields:
            section = getattr(self, name)
            keys |= section.old_keys(f"{prefix}{name}.") if isinstance(section, Section) else {}
        return keys
