"""What a config chose: its strategies, built and with their hooks registered, and what follows from them. No weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from marl_core.artifacts.architecture import Architecture, Shapes, adaptable_layers, as_held
from marl_core.artifacts.lora_targets import matches
from marl_core.artifacts.model_files import read_model
from marl_core.artifacts.rows import first_columns
from marl_core.config.adapter_config import AdapterSection, ValueOn
from marl_core.config.choice import ReferenceChoice, RewardChoice
from marl_core.config.run_config import RunConfig
from marl_core.errors import ConfigError, DataError, PluginError
from marl_core.registry.hooks import Hooks
from marl_core.registry.model_keys import KeyPath, dotted
from marl_core.registry.strategy import Adapter, Estimator, Quantization, Strategy


@dataclass(frozen=True)
class Chosen:
    """A config with its strategies. Immutable; holds no weights and imports nothing heavy."""

    config: RunConfig
    hooks: Hooks
    strategies: Mapping[KeyPath, Strategy]
    """Each strategy by its path in the config: `("reward", 0)`."""

    @property
    def reference(self) -> Strategy:
        """Which weights are the reference."""
        return self.strategies["reference",]

    @property
    def rewards(self) -> tuple[tuple[RewardChoice, Strategy], ...]:
        """The reward sources as the config names them, and as they were built."""
        return tuple((choice, self.strategies["reward", i]) for i, choice in enumerate(self.config.reward))

    @property
    def judges(self) -> Mapping[str, tuple[RewardChoice, Strategy]]:
        """The same of `eval.judges`, by name."""
        choices = self.config.eval.judges
        return {name: (choice, self.strategies["eval", "judges", name]) for name, choice in choices.items()}

    @property
    def quantization_strategy(self) -> Strategy:
        """Who says how the base is loaded."""
        return self.strategies["quantization",]

    @property
    def advantage_strategy(self) -> Strategy:
        """Who says how rewards become advantages."""
        return self.strategies["ppo", "advantage"]

    @property
    def observers(self) -> tuple[Strategy, ...]:
        """Who watches, in the order of the config."""
        return tuple(self.strategies["observers", i] for i in range(len(self.config.observers)))

    @property
    def reference_choice(self) -> ReferenceChoice:
        """The reference as the config names it."""
        return self.config.reference

    @cached_property
    def quantization(self) -> Quantization:
        """How the base is loaded. The first reading calls the strategy, which may import its backend."""
        return self.hooks.quantization(self.quantization_strategy, self.config.model.dtype)

    @cached_property
    def estimator(self) -> Estimator:
        """How rewards become advantages, and what that needs."""
        return self.hooks.advantage(self.advantage_strategy)

    @property
    def value_on(self) -> ValueOn:
        """Where the value function lives, the default resolved."""
        return self.config.value.on or ("policy" if self.estimator.needs_values else "none")

    @property
    def adapter_strategies(self) -> Mapping[str, tuple[AdapterSection, Strategy]]:
        """The adapters that are made for this run, by the key that asks for them: `policy`, `value`.

        Without a policy that is continued, which is of the kind that its file holds.
        """
        sections: dict[str, AdapterSection] = {"policy": self.config.policy, "value": self.config.value}
        return {key: (section, self.strategies[key,]) for key, section in sections.items() if (key,) in self.strategies}

    @cached_property
    def policy_adapter(self) -> Adapter | None:
        """What is trained as the policy, by the shapes of the model's files; None where they aren't here, and for one that is continued."""
        return self._adapter("policy")

    @cached_property
    def value_adapter(self) -> Adapter | None:
        """The same of the value function's own adapter; None where it has none, too."""
        return self._adapter("value")

    def _adapter(self, key: str) -> Adapter | None:
        if key not in self.adapter_strategies or self._model_layers is None:
            return None
        return self.adapter_on(key, *self._model_layers)

    @cached_property
    def _model_layers(self) -> tuple[Mapping[str, tuple[int, int]], Shapes] | None:
        """The model's linear layers, (out, in), and its weights, by the shapes of its files; None where they aren't here."""
        model = self.config.model
        try:
            files = read_model(model.path, model.revision)
            stored = files.shapes() if files is not None else {}
        except DataError:
            return None  # told by whoever needs the model
        if files is None or not stored:
            return None
        kind = Architecture.of(files.config).model_type
        shapes = as_held(stored, kind)
        return adaptable_layers(shapes, kind), shapes

    def adapted_layers(self, key: str) -> Mapping[str, tuple[int, int]]:
        """The linear layers, (out, in), that the adapter under `policy` or `value` is to stand on.

        Empty where the model's files aren't here. ConfigError for targets that are no regular expression.
        """
        return self._targeted(key, self._model_layers[0]) if self._model_layers is not None else {}

    def _targeted(self, key: str, layers: Mapping[str, tuple[int, int]]) -> Mapping[str, tuple[int, int]]:
        section, _ = self.adapter_strategies[key]
        try:
            return {name: shape for name, shape in layers.items() if matches(section.targets, name)}
        except ConfigError as error:
            raise ConfigError(f"{key}.targets: {error}") from error

    def adapter_said(self, key: str) -> Adapter | None:
        """What the strategy under `policy` or `value` says of its adapter: of the model's layers where its files are here, else of none.

        How it starts, which quantizations it was tried on and its rates don't depend on layers. None where no such adapter is made.
        """
        known: Adapter | None = getattr(self, f"{key}_adapter")
        if known is not None or key not in self.adapter_strategies:
            return known
        with suppress(PluginError):  # a strategy may need layers: it is asked again when they are known
            return self.adapter_on(key, {}, {})
        return None

    def adapter_on(self, key: str, layers: Mapping[str, tuple[int, int]], shapes: Shapes) -> Adapter:
        """What is trained on a model with these linear layers, (out, in), and weights, under the key `policy` or `value`.

        PluginError for a strategy that gives something else; ConfigError for targets that are no regular expression.
        """
        _, strategy = self.adapter_strategies[key]
        return self.hooks.adapter(strategy, self._targeted(key, layers), shapes, key)

    @cached_property
    def data_columns(self) -> Mapping[str, frozenset[str]]:
        """Columns of the first rows of the prompts, by the config key that names them: `data.prompts`, `eval.prompts`.

        Without those whose rows aren't in a file here that is cheap to look into.
        """
        data = self.config.data
        sources = {"data.prompts": (data.prompts, data.limit) if data else None}
        sources["eval.prompts"] = (self.config.eval.prompts, None) if self.config.eval.prompts else None
        found = {key: first_columns(*source) for key, source in sources.items() if source is not None}
        return {key: columns for key, columns in found.items() if columns is not None}

    @cached_property
    def places(self) -> Mapping[Strategy, str]:
        """Each strategy's path in the config: `reference`, `reward.0`, `eval.judges.vader`, `observers.1`."""
        return {strategy: dotted(path) for path, strategy in reversed(list(self.strategies.items()))}
