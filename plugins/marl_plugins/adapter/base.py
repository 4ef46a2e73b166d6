"""What all kinds that PEFT knows have in common: options of PEFT's, checked by the core's table, and facts by shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from marl_core import ANY_QUANTIZATION, Adapter, ConfigError, Strategy, config_refusal, hookimpl, known_kind
from marl_plugins.adapter.layers import Layers as Layers
from marl_plugins.adapter.sizes import Wrong, misfits

if TYPE_CHECKING:
    from marl_core import Plan

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
SECTION = "policy"
"""The key under which a strategy names its options; the core puts the one in its place that they stand under."""


class PeftKind(Strategy):
    """An adapter of one of PEFT's kinds."""

    peft_type: ClassVar[str] = ""
    """PEFT's type in lower case."""

    def peft_kind(self) -> str:
        """PEFT's type in lower case; of a strategy for several what an option says."""
        return self.peft_type

    def peft_options(self, layers: Layers, shapes: Shapes) -> dict[str, Any]:
        """The options of PEFT's config that this strategy's own stand for."""
        raise NotImplementedError

    def own_names(self) -> Mapping[str, str]:
        """Which of this strategy's options stands for one of PEFT's, for messages."""
        return {}

    def learned(self, layers: Layers, shapes: Shapes) -> int:
        """How many numbers learn."""
        raise NotImplementedError

    def held(self, layers: Layers, shapes: Shapes) -> int:
        """Bytes that it holds beside them."""
        return 0

    def rates(self) -> Mapping[str, float]:
        """Factors on the learning rate by a part of a parameter's name."""
        return {}

    def said(self, layers: Layers) -> str:
        """Its options in a few words; `layers` is empty where the model's aren't known."""
        return ""

    def misfits(self, layers: Layers, shapes: Shapes) -> Iterator[Wrong]:
        """What doesn't fit the layers: PEFT's name of an option, and a sentence."""
        yield from misfits(self.peft_kind(), self.peft_options(layers, shapes), layers)

    @hookimpl
    def marl_check(self, plan: Plan) -> Iterable[str]:
        """Options that can't serve a base which several roles share."""
        yield from self.wrong(plan)

    def wrong(self, plan: Plan) -> Iterator[str]:
        """A sentence for each option that can't work."""
        yield from config_refusal(self.peft_kind(), self.peft_options({}, {}), SECTION, names=self.own_names())

    @hookimpl
    def marl_describe(self, plan: Plan) -> str:
        """The kind and its options."""
        title = known_kind(self.peft_kind(), self.peft_options({}, {})).title
        said = self.said(plan.adapted_layers(key_of(plan, self)))
        return f"{title} on the base{': ' if said else ''}{said}"

    @hookimpl
    def marl_adapter(self, layers: Layers, shapes: Shapes, role: str) -> Adapter:
        """PEFT's config, and the facts of the core's table. ConfigError for options that don't fit the layers."""
        for name, what in self.misfits(layers, shapes):
            raise ConfigError(f"{SECTION}.{self.own_names().get(name, name)}: {what}")
        options = self.peft_options(layers, shapes)
        kind = known_kind(self.peft_kind(), options)
        return Adapter(
            lambda: peft_config(self.peft_kind(), options),
            learned=self.learned(layers, shapes),
            held=self.held(layers, shapes),
            kept=kind.kept,
            folded=kind.folded,
            start="rounded" if kind.start == "rounded" else "base",
            packed=frozenset({ANY_QUANTIZATION}) if kind.any_quantized else kind.packed,
            rates=self.rates(),
        )


def peft_config(kind: str, options: Mapping[str, Any]) -> Any:
    """PEFT's config of this kind. ConfigError for options that PEFT doesn't take."""
    from peft import PeftType, get_peft_config

    try:
        return get_peft_config({"peft_type": PeftType(kind.upper()).value, **options})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{SECTION}: peft's config of {kind} doesn't accept {dict(options)}: {error}") from error


def key_of(plan: Plan, strategy: Strategy) -> str:
    """The section that the strategy stands in: `policy` or `value`."""
    return plan.places.get(strategy, SECTION)


def section_of(plan: Plan, strategy: Strategy) -> Any:
    """That section itself: it has `targets` and `dropout`."""
    return plan.config.value if key_of(plan, strategy) == "value" else plan.config.policy


def without_dropout(plan: Plan, strategy: Strategy, title: str) -> Iterator[str]:
    """The sentence for a dropout that is asked of a kind that has none."""
    dropout = section_of(plan, strategy).dropout
    if dropout > 0:
        yield f"{key_of(plan, strategy)}.dropout: {dropout}, and adapters of the kind {title} have none. Set it to 0."
