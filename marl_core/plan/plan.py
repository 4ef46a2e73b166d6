"""Plan: the config with its strategies built and their hooks registered, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from pydantic import ValidationError

from marl_core.config.choice import Choice
from marl_core.config.fields import choices_in, written_choices_in
from marl_core.config.run_config import RunConfig
from marl_core.config.validation_messages import problem_lines
from marl_core.errors import ConfigError, InvalidConfig, MarlError, together
from marl_core.plan.checks import core_findings, core_warnings, remarks_here
from marl_core.plan.chosen import Chosen
from marl_core.plan.describe import Role, describe_roles
from marl_core.plan.standing_members import with_standing_members
from marl_core.plan.stored_weights import as_stored
from marl_core.registry.catalog import Catalog
from marl_core.registry.hooks import Hooks
from marl_core.registry.model_keys import KeyPath, dotted
from marl_core.registry.strategy import Strategy


@dataclass(frozen=True)
class Plan(Chosen):
    """What will run: config and strategies. Immutable; holds no weights and imports nothing heavy."""

    @classmethod
    def of(cls, config: RunConfig, catalog: Catalog | None = None, *, command_line: bool = False) -> Plan:
        """Build every strategy the config names (installed ones by default) and register their hooks.

        A folder whose weights are quantized already is held as what it is, where the config asks for no quantization. Members that are
        there whether named or not join those that are (`with_standing_members`); `command_line`: those of `marl run`, too.
        Raises ConfigError for unknown names and wrong options, PluginError for a broken plugin.
        """
        catalog = catalog or Catalog.installed()
        config = with_standing_members(as_stored(config, catalog), catalog, command_line=command_line)
        every = {path: _resolve(path, choice, config, catalog) for path, choice in written_choices_in(config)}
        built = {path: every[path] for path, _ in choices_in(config)}
        hooks = Hooks(((built[path], choice.origin) for path, choice in choices_in(config)), built)
        return cls(config, hooks, built)

    def without_observers(self) -> Self:
        """The same run without observers: what every rank but the first runs."""
        remaining = {path: strategy for path, strategy in self.strategies.items() if path[0] != "observers"}
        hooks = Hooks(((strategy, self.hooks.origin(strategy)) for strategy in remaining.values()), remaining)
        return self._with_strategies(hooks, remaining, self.config.model_copy(update={"observers": []}))

    def for_run(self, run: object) -> Self:
        """This plan for one run: strategies that serve another run already are replaced by fresh ones with their options.

        Strategies keep what a run needs (open files, a screen, a copy of the policy), so no two runs share one.
        """
        serving = {strategy: strategy.serve(run) for strategy in self.hooks.strategies}
        strategies = {path: serving[strategy] for path, strategy in self.strategies.items()}
        hooks = Hooks(
            ((serving[strategy], self.hooks.origin(strategy)) for strategy in self.hooks.strategies), strategies
        )
        return self._with_strategies(hooks, strategies, self.config)

    def _with_strategies(self, hooks: Hooks, strategies: Mapping[KeyPath, Strategy], config: RunConfig) -> Self:
        """This plan with other strategies; the quantization is taken over where its strategy stays.

        The estimator is asked for anew, so that its calls go through these hooks and their guard; and at once, before a run sets
        that guard.
        """
        plan = replace(self, hooks=hooks, strategies=strategies, config=config)
        if "quantization" in vars(self) and plan.quantization_strategy is self.quantization_strategy:
            vars(plan)["quantization"] = self.quantization
        vars(plan)["estimator"] = hooks.advantage(plan.advantage_strategy)
        return plan

    def release(self) -> None:
        """The run is over: its strategies may serve another."""
        for strategy in self.hooks.strategies:
            strategy.serve(None)

    def check(self) -> list[str]:
        """Every reason, known without weights, why this run can't work."""
        return [str(finding) for finding in self.findings()]

    def warnings(self) -> list[str]:
        """What will run and may not be what was meant, each with its consequence."""
        return core_warnings(self)

    def remarks_here(self) -> list[str]:
        """What would stop this run on this machine, or in its folder as it is now, and may be right elsewhere or later."""
        return remarks_here(self)

    def require(self) -> None:
        """Raise if `check` finds anything: a DataError if all of it is about files, a PluginError if about plugins, else a ConfigError."""
        require_none(self.findings())

    def findings(self) -> list[MarlError]:
        """What `check` says, as errors: each of the kind that it would be alone."""
        return _distinct([*core_findings(self), *self.hooks.check(self)])

    def describe(self) -> list[Role]:
        """Each role of the run, where its weights live, and what follows from it."""
        return describe_roles(self)


def require_none(findings: Sequence[MarlError]) -> None:
    """Raise all of these together, if there are any."""
    if findings:
        raise together(_distinct(findings), "this run can't work:")


def _distinct(findings: Sequence[MarlError]) -> list[MarlError]:
    """Each sentence once: two strategies may name one file, training and evaluation one source."""
    return list({str(finding): finding for finding in findings}.values())


def _resolve(path: KeyPath, choice: Choice, config: RunConfig, catalog: Catalog) -> Strategy:
    try:
        return choice.build(catalog)
    except ValidationError as error:
        lines = problem_lines(error, config.model_dump(by_alias=True), type(config), catalog, path)
        raise InvalidConfig("\n".join(lines.values())) from error
    except ConfigError as error:
        raise ConfigError(f"{dotted(path)}: {error}") from error
