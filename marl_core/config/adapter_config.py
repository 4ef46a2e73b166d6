"""The sections of the trained adapters: each is a choice of a kind of adapter, and says beside its options where the adapter stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, InstanceOf, PositiveFloat, model_validator

from marl_core.config.choice import SECTIONS, Choice
from marl_core.config.section import Section, UnitInterval
from marl_core.errors import MarlError
from marl_core.registry.catalog import installed_once
from marl_core.registry.deprecation import warn_deprecated
from marl_core.registry.families import FAMILIES
from marl_core.registry.path_text import PathText
from marl_core.registry.strategy import Strategy

DEFAULT_KIND = FAMILIES["adapter"].key.default or ""
ALL_LINEAR = "all-linear"
ONCE_WRITTEN_OUT: Mapping[str, Any] = {"r": 16, "alpha": 32.0, "lora": {}}
"""Keys of a LoRA that configs of older versions hold at these values, whatever kind of adapter the section means."""


class AdapterSection(Section, Choice):
    """A trained adapter: its kind with the kind's options, and where it stands."""

    family = "adapter"
    default_use = DEFAULT_KIND

    use: str | InstanceOf[Strategy] = Field(default=DEFAULT_KIND, union_mode="left_to_right")
    """Kind of adapter: `lora`, `dora`, `oft`, ...; its options stand beside it."""
    targets: str | list[str] = ALL_LINEAR
    """Module names to adapt, or `all-linear`."""
    dropout: UnitInterval = 0.0
    """The adapter's dropout; anything above 0 makes old and new log-probs differ."""

    def __init_subclass__(cls, at: str | None = None, **more: Any) -> None:
        """Note the section as what is chosen at its path."""
        super().__init_subclass__(at=at, **more)
        if at:
            SECTIONS[at] = cls

    @classmethod
    def long_form(cls, value: Any) -> Any:
        """A kind's name, or a Strategy, as `{use: kind}`."""
        if hasattr(value, "peft_type") and not isinstance(value, Strategy):
            raise ValueError(
                f"a {type(value).__name__} object can't be kept in a run folder; give the kind by name with its options beside it, "
                "{'use': ..., ...}, or marl's strategy of that kind: `marl plugins` lists them"
            )
        return Choice.long_form.__func__(cls, value)  # type: ignore[attr-defined]  # Section has one of the same name

    def check_early(self) -> None:
        """Options of a kind that is installed: a section tells a misspelt key where it is written."""
        if isinstance(self.use, Strategy) or not self.options:
            return
        try:
            loaded = installed_once().load(self.family, self.use)
        except MarlError:
            return  # whoever makes a plan of it says so
        loaded.build(self.options)

    if not TYPE_CHECKING:  # to a type checker they are gone

        def __getattr__(self, name: str) -> Any:
            """A LoRA's options as older versions had them here, with a warning."""
            if name not in ONCE_WRITTEN_OUT:
                return super().__getattr__(name)
            warn_deprecated(f"config.{self.place}.{name}", f"config.{self.place}.resolve().{name}", "0.1")
            return getattr(self.resolve(), name)


class PolicySection(AdapterSection, at="policy"):
    """The trained adapter."""

    if TYPE_CHECKING:

        def __init__(self, **keys: Any) -> None:
            """The keys of a file, and the options of the adapter's kind."""

    start: Literal["new", "continue"] = "new"
    """`new`: a fresh adapter on the base. `continue`: a trainable copy of an existing one, of the kind that it is."""
    source: PathText | None = Field(default=None, alias="from")
    """Adapter to copy when `start` is `continue`: a folder, or a hub name `owner/name`."""
    revision: str | None = Field(default=None, min_length=1)
    """Hub revision (branch, tag or commit) of `from`."""
    subfolder: str | None = Field(default=None, min_length=1)
    """Folder inside `from` that holds the adapter."""

    @property
    def is_used(self) -> bool:
        """An adapter that is continued brings its kind and options."""
        return self.start == "new"

    @classmethod
    def long_form(cls, value: Any) -> Any:
        """As of every adapter; options that older versions wrote out beside `start: continue` are left out."""
        value = super().long_form(value)
        if not isinstance(value, Mapping) or value.get("start") != "continue":
            return value
        return {key: value[key] for key in value if key not in ONCE_WRITTEN_OUT or value[key] != ONCE_WRITTEN_OUT[key]}

    @model_validator(mode="after")
    def _source_fits_start(self) -> PolicySection:
        if self.start == "continue" and not self.source:
            raise ValueError("start: continue needs `from: path/to/adapter`")
        if self.start == "new" and self.source:
            raise ValueError("`from` is only used with start: continue; remove it or write start: continue")
        if self.start == "new" and (self.revision or self.subfolder):
            raise ValueError("`revision` and `subfolder` are those of `from`; the base's revision is model.revision")
        ignored = [
            *(["use"] if self.use != self.default_use else []),
            *self.options,
            *(["targets"] if self.targets != ALL_LINEAR else []),
        ]
        if self.start == "continue" and ignored:
            raise ValueError(f"start: continue takes {', '.join(ignored)} from the adapter; remove them here")
        return self


ValueOn = Literal["policy", "own", "none"]


class ValueSection(AdapterSection, at="value"):
    """The value function."""

    if TYPE_CHECKING:

        def __init__(self, **keys: Any) -> None:
            """The keys of a file, and the options of the kind of its own adapter."""

    on: ValueOn | None = None
    """`policy`: a head on its trunk. `own`: an adapter of its own. `none`. Default: policy if the estimator needs values, else none."""
    learning_rate: PositiveFloat | None = None
    """Learning rate of head and own adapter; `ppo.learning_rate` when absent."""

    @property
    def is_used(self) -> bool:
        """Only where it has an adapter of its own."""
        return self.on == "own"

    @classmethod
    def long_form(cls, value: Any) -> Any:
        """A single word stands for `{on: word}`, a Strategy for an adapter of its own."""
        if isinstance(value, Strategy):
            return {"on": "own", "use": value}
        return {"on": value} if isinstance(value, str) else value
