"""Choice: a config value that names a strategy and carries its options, or holds the strategy itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PrivateAttr,
    SerializationInfo,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from marl_core.errors import ConfigError, InvalidConfig
from marl_core.registry.callables import is_function, is_strategy_class, short_name, without_callables
from marl_core.registry.catalog import Catalog, verify
from marl_core.registry.families import FAMILIES, Family, FamilyName, Key
from marl_core.registry.model_keys import keys_of
from marl_core.registry.strategy import Strategy


class Choice(BaseModel):
    """`name`, `{use: name, option: value, ...}`, a Strategy object, or a function where the family has a strategy that calls one.

    With a catalog in the validation context the name is looked up and the options are checked by the
    strategy's own model at once; without one (a config built in Python) that happens in `Plan.of`.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True, use_attribute_docstrings=True
    )
    family: ClassVar[FamilyName]
    default_use: ClassVar[str | None] = None
    """The strategy that is meant where a mapping names none; None: it must name one."""

    use: str | InstanceOf[Strategy] = Field(union_mode="left_to_right")
    """Name of the strategy, `package/name` where two packages offer it, or (in Python) the strategy itself."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The strategy's own options; in YAML they stand beside `use`."""
    _strategy: Strategy | None = PrivateAttr(None)
    _origin: str = PrivateAttr("")
    _label: str = PrivateAttr("")

    @classmethod
    def long_form(cls, value: Any) -> Any:
        """`name`, or a Strategy, as `{use: name}`; a function as the strategy that calls it; anything else as it is."""
        if isinstance(value, str | Strategy):
            return {"use": value}
        if is_function(value):
            return cls._calling(value)
        if isinstance(value, Mapping) and is_function(value.get("use")):
            beside = {key: value[key] for key in value if key != "use"}
            return {**cls._calling(value["use"]), **beside}
        return value

    @property
    def is_used(self) -> bool:
        """Whether a run has this strategy: a value function without an adapter of its own has none."""
        return True

    @property
    def is_written(self) -> bool:
        """Whether it is used, or says something that is to be checked all the same."""
        return self.is_used or bool(self.options) or self.use != self.default_use

    @classmethod
    def _calling(cls, function: Callable[..., Any]) -> dict[str, Any]:
        """The long form of a strategy that calls this function."""
        standing_for = FAMILIES[cls.family].from_callable
        if standing_for is None:
            raise ValueError(f"a function can't stand for a {cls.family}; give a strategy's name, or a strategy object")
        strategy, option = standing_for
        return {"use": strategy, option: function}

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        value = cls.long_form(value)
        if isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[1], int | float):
            raise ValueError(f'give the weight by its name: {{"use": {_called(value[0])}, "weight": {value[1]!r}}}')
        named = value.get("use") if isinstance(value, Mapping) else value
        if is_strategy_class(named):
            raise ValueError(f"{named.__name__} is a class; give a strategy made of it: {named.__name__}(...)")
        if isinstance(value, Mapping) and ("use" in value or cls.default_use is not None):
            known = {*cls.model_fields, *keys_of(cls)}
            own_keys = {key: value[key] for key in value if key in known}
            inline_options = {key: value[key] for key in value if key not in known}
            options = own_keys.get("options", {})
            return {**own_keys, "options": {**options, **inline_options} if isinstance(options, Mapping) else options}
        if not isinstance(value, Mapping | Choice):
            function = ", or in Python a function" if FAMILIES[cls.family].from_callable else ""
            raise ValueError(
                f"give a strategy's name, or {{use: name, option: value}}{function}; this is {value!r:.60}"
            )
        return value

    @model_validator(mode="after")
    def _look_up(self, info: ValidationInfo) -> Self:
        catalog = (info.context or {}).get("catalog")
        if not self.is_written:
            return self
        try:
            if catalog is not None:
                self.resolve(catalog)
            else:
                self.check_early()
        except ConfigError as error:  # so that pydantic adds the path and goes on to the next problem
            raise ValueError(str(error)) from error
        return self

    def check_early(self) -> None:
        """What can be said of a choice in Python before a plan is made of it. Raises as `resolve`."""

    def resolve(self, catalog: Catalog | None = None) -> Strategy:
        """The strategy object: the one given, or the named one built from the options. Cached after the first call.

        `catalog` is by default what is installed. Raises ConfigError for an unknown name or options beside an object, pydantic's
        ValidationError for wrong options, PluginError for a broken plugin.
        """
        if self._strategy is None:
            catalog = catalog or Catalog.installed()
            if isinstance(self.use, Strategy):
                if self.options:
                    raise ConfigError(
                        f"options {sorted(self.options)} stand beside a {type(self.use).__name__} object, "
                        "which already has its own; give them to its constructor."
                    )
                kind = type(self.use)
                listing = catalog.listing_of(self.family, kind)
                origin = listing.display_name if listing else f"{kind.__qualname__} of {kind.__module__}"
                verify(kind, self.family, f"{self.family} strategy {origin}")
                self._strategy, self._origin = self.use, origin
                self._label = listing.name if listing else ""
            else:
                loaded = catalog.load(self.family, self.use)
                self._strategy, self._origin = loaded.build(self.options), loaded.listing.display_name
        return self._strategy

    def build(self, catalog: Catalog) -> Strategy:
        """The strategy for one plan: a new one where the config gives a name, else the object that it holds. Raises as `resolve`."""
        strategy = self.resolve(catalog)
        return strategy if strategy is self.use else strategy.fresh()

    def __eq__(self, other: object) -> bool:
        """Equal when they ask for the same; whether the strategy was looked up already doesn't matter."""
        if not isinstance(other, Choice) or type(self) is not type(other):
            return NotImplemented
        return all(getattr(self, field) == getattr(other, field) for field in type(self).model_fields)

    @property
    def origin(self) -> str:
        """Who provides the strategy: package and version, or class and module of an object given in Python."""
        return self._origin

    @property
    def label(self) -> str:
        """Short name for logs and metrics: the strategy's name, also of an object whose class is installed under one; else its class."""
        return self.use if isinstance(self.use, str) else self._label or type(self.use).__name__

    if not TYPE_CHECKING:  # to a type checker it is a frozen model's error

        def __setattr__(self, name: str, value: Any) -> None:
            """As BaseModel's, with words of our own for what can't be set."""
            try:
                super().__setattr__(name, value)
            except ValidationError as error:
                raise InvalidConfig(
                    f"{self.family}: a config doesn't change. config.with_changes(KEY, VALUE) gives a new one, with KEY as in a file, "
                    f"such as 'reward.0.weight'; here its last part is {name!r}."
                ) from error

    @model_serializer
    def _as_written(self, info: SerializationInfo) -> dict[str, Any]:
        fields = {name: field for name, field in type(self).model_fields.items() if name not in ("use", "options")}
        own = {
            field.alias if info.by_alias and field.alias else name: getattr(self, name)
            for name, field in fields.items()
        }
        if not self.is_used and self.use == self.default_use:  # names no kind: it has none
            return {**own, **self.options}
        if isinstance(self.use, str):
            options = without_callables(self.options) if info.mode_is_json() else self.options
            return {"use": self.use, **own, **options}
        kind = type(self.use)  # an object has no name in a config: its class and options are for the reader
        options = self.use.model_dump(mode="json", fallback=repr)
        return {"use": f"{kind.__module__}:{kind.__qualname__}", **own, **options}


class ReferenceChoice(Choice):
    """A reference, and what may be said beside its options."""

    family = "reference"
    allow_mismatch: bool = False
    """Go on although the reference isn't the model the policy starts from."""


class RewardChoice(Choice):
    """A reward source, and what may be said beside its options."""

    family = "reward"
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of this source's scores in the sum."""
    name: str | None = None
    """Name in metrics and samples; when absent the strategy's name, or that of a function given in Python."""

    @classmethod
    def _calling(cls, function: Callable[..., Any]) -> dict[str, Any]:
        """With the function's own name for metrics, where it has one."""
        name = short_name(function)
        return {**super()._calling(function), **({"name": name} if name else {})}


def default_options(strategy_class: type[Strategy]) -> dict[str, Any]:
    """The options of a strategy that have a default, with it."""
    return {
        name: field.get_default(call_default_factory=True, validated_data={})
        for name, field in strategy_class.model_fields.items()
        if not field.is_required()
    }


@cache
def choice_of(family: Family) -> type[Choice]:
    """The Choice class of a family: the one above that its record names, or a plain Choice of that family."""
    choice_class: type[Choice] = globals()[family.choice]
    if choice_class is not Choice:
        return choice_class
    namespace = {"__module__": __name__, "__doc__": family.about, "family": family.name}
    return type(f"{family.name.capitalize()}Choice", (Choice,), namespace)


SECTIONS: dict[str, type[Choice]] = {}
"""Sections that are choices themselves, by their path in a config: `policy`. Each writes itself down (config/section.py)."""


def choice_at(family: Family, key: Key) -> type[Choice]:
    """The class of what stands under a key: the section that is a choice itself, or the family's."""
    return SECTIONS.get(key.path) or choice_of(family)


def chosen_field(family: Family, key: Key) -> tuple[Any, FieldInfo]:
    """The type and the field of a config key, as its record says."""
    choice: Any = choice_of(family)
    if key.many == "named":
        by_name = Annotated[dict[str, choice], BeforeValidator(_need_names, json_schema_input_type=dict[str, choice])]
        return by_name, _field(key, default_factory=dict)
    if key.many == "list":
        single_or_list = Annotated[
            list[choice], BeforeValidator(_as_list, json_schema_input_type=list[choice] | choice)
        ]
        return single_or_list, _field(key, default_factory=list)
    if key.default is None:
        return choice, _field(key)
    return choice, _field(key, default_factory=lambda: choice(use=key.default), validate_default=True)


def _field(key: Key, **more: Any) -> FieldInfo:
    field: FieldInfo = Field(description=key.about, **more)
    return field


def _called(value: Any) -> str:
    """A strategy or a function as the program that gave it may write it."""
    if isinstance(value, str):
        return repr(value)
    return f"{type(value).__name__}(...)" if isinstance(value, Strategy) else short_name(value) or "..."


def _need_names(value: Any) -> Any:
    """Judges and their like have names; ValueError that shows how to give them."""
    if value is None or isinstance(value, Mapping):
        return value
    entries = list(value) if isinstance(value, list | tuple) else [value]
    names = [
        (short_name(entry) if is_function(entry) else None) or f"name{number}"
        for number, entry in enumerate(entries, 1)
    ]
    named = ", ".join(f'"{name}": {_called(entry)}' for name, entry in zip(names, entries, strict=True))
    raise ValueError(f"give each a name, for metrics: {{{named}}}")


def _as_list(value: Any) -> Any:
    """A single choice as a list of one; a pair of a strategy and its weight is one too, which is told what is missing."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], int | float):
        return [value]
    return list(value) if isinstance(value, list | tuple) else [value]
