"""Plan: the config with its strategies built and their hooks registered, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from pydantic import ValidationError

from marl_core.config.choice import Choice, ReferenceChoice, RewardChoice
from marl_core.config.run_config import RunConfig
from marl_core.config.validation_messages import dotted, problem_lines
from marl_core.errors import ConfigError, DataError, MarlError
from marl_core.plan.checks import core_findings, core_warnings
from marl_core.plan.describe import Role, describe_roles
from marl_core.plan.stored_weights import as_stored
from marl_core.registry.catalog import Catalog
from marl_core.registry.hooks import Hooks
from marl_core.registry.strategy import Quantization, Strategy

Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Plan:
    """What will run: config and strategies. Immutable; holds no weights and imports nothing heavy."""

    config: RunConfig
    hooks: Hooks
    reference: Strategy
    rewards: tuple[tuple[RewardChoice, Strategy], ...]
    judges: Mapping[str, tuple[RewardChoice, Strategy]]
    quantization_strategy: Strategy
    observers: tuple[Strategy, ...]

    @classmethod
    def of(cls, config: RunConfig, catalog: Catalog | None = None) -> Plan:
        """Build every strategy the config names (installed ones by default) and register their hooks.

        A folder whose weights are quantized already is held as what it is, where the config asks for no quantization.
        Raises ConfigError for unknown names and wrong options, PluginError for a broken plugin.
        """
        catalog = catalog or Catalog.installed()
        config = as_stored(config, catalog)
        built = {place: _resolve(place, choice, config, catalog) for place, choice in _choices(config)}
        return cls(
            config=config,
            hooks=Hooks((built[place], choice.origin) for place, choice in _choices(config)),
            reference=built[("reference",)],
            rewards=tuple((choice, built["reward", i]) for i, choice in enumerate(config.reward)),
            judges={name: (choice, built["eval", "judges", name]) for name, choice in config.eval.judges.items()},
            quantization_strategy=built[("quantization",)],
            observers=tuple(built["observers", i] for i in range(len(config.observers))),
        )

    def without_observers(self) -> Plan:
        """The same run with nobody watching: what every rank but the first runs."""
        kept = [(strategy, self.hooks.origin(strategy)) for strategy in self.hooks.strategies]
        hooks = Hooks((strategy, origin) for strategy, origin in kept if strategy not in self.observers)
        return replace(self, config=self.config.model_copy(update={"observers": []}), hooks=hooks, observers=())

    def for_run(self, run: object) -> Plan:
        """This plan for one run: strategies that serve another run already are replaced by fresh ones with their options.

        Strategies keep what a run needs (open files, a screen, a copy of the policy), so no two runs share one.
        """
        mine = {strategy: strategy.serve(run) for strategy in self.hooks.strategies}
        plan = replace(
            self,
            hooks=Hooks((mine[strategy], self.hooks.origin(strategy)) for strategy in self.hooks.strategies),
            reference=mine[self.reference],
            rewards=tuple((choice, mine[strategy]) for choice, strategy in self.rewards),
            judges={name: (choice, mine[strategy]) for name, (choice, strategy) in self.judges.items()},
            quantization_strategy=mine[self.quantization_strategy],
            observers=tuple(mine[strategy] for strategy in self.observers),
        )
        if "quantization" in vars(self) and plan.quantization_strategy is self.quantization_strategy:
            vars(plan)["quantization"] = self.quantization  # the strategy is asked once
        return plan

    def release(self) -> None:
        """The run is over: its strategies may serve another."""
        for strategy in self.hooks.strategies:
            strategy.serve(None)

    @property
    def reference_choice(self) -> ReferenceChoice:
        """The reference as the config names it."""
        return self.config.reference

    @cached_property
    def quantization(self) -> Quantization:
        """How the base is loaded. The first reading calls the strategy, which may import its backend."""
        return self.hooks.quantization(self.quantization_strategy, self.config.model.dtype)

    @cached_property
    def places(self) -> Mapping[Strategy, str]:
        """Each strategy's place in the config: `reference`, `reward.0`, `eval.judges.vader`, `observers.1`."""
        strategies = {
            "reference": self.reference,
            **{f"reward.{i}": strategy for i, (_, strategy) in enumerate(self.rewards)},
            **{f"eval.judges.{name}": strategy for name, (_, strategy) in self.judges.items()},
            "quantization": self.quantization_strategy,
            **{f"observers.{i}": strategy for i, strategy in enumerate(self.observers)},
        }
        return {strategy: place for place, strategy in reversed(strategies.items())}

    def check(self) -> list[str]:
        """Every reason, known without weights, why this run can't work."""
        return [str(finding) for finding in self._findings()]

    def warnings(self) -> list[str]:
        """What will run and may not be what was meant, each with its consequence."""
        return core_warnings(self)

    def require(self) -> None:
        """Raise if `check` finds anything: a DataError if all of it is about files, else a ConfigError."""
        findings = self._findings()
        if findings:
            kind = DataError if all(isinstance(finding, DataError) for finding in findings) else ConfigError
            raise kind("\n".join(["this run can't work:", *(f"  {finding}" for finding in findings)]))

    def _findings(self) -> list[MarlError]:
        said = [ConfigError(f"{sentence} (says {origin})") for origin, sentence in self.hooks.check(self)]
        return [*core_findings(self), *said]

    def describe(self) -> list[Role]:
        """Each role of the run, where its weights live, and what follows from it."""
        return describe_roles(self)


def _choices(config: RunConfig) -> Iterator[tuple[Place, Choice]]:
    """Every choice of a strategy with its place in the config."""
    yield ("quantization",), config.quantization
    yield ("reference",), config.reference
    yield from ((("reward", i), choice) for i, choice in enumerate(config.reward))
    yield from ((("eval", "judges", name), choice) for name, choice in config.eval.judges.items())
    yield from ((("observers", i), choice) for i, choice in enumerate(config.observers))


def _resolve(place: Place, choice: Choice, config: RunConfig, catalog: Catalog) -> Strategy:
    try:
        return choice.build(catalog)
    except ValidationError as error:
        lines = problem_lines(error, config.model_dump(by_alias=True), catalog, place)
        raise ConfigError("\n".join(lines.values())) from error
    except ConfigError as error:
        raise ConfigError(f"{dotted(place)}: {error}") from error
