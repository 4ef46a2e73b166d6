"""Hooks: pluggy behind a typed front. The only file that touches pluggy's untyped relay."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pluggy

from marl_core.errors import (
    ConfigError,
    MarlDeprecationWarning,
    MarlError,
    MarlWarning,
    PluginError,
    Stopped,
    in_words,
    near_match,
    warn,
)
from marl_core.registry.deprecation import gone_in
from marl_core.registry.families import family_keys
from marl_core.registry.hookspecs import MarlSpecs
from marl_core.registry.model_keys import KeyPath, dotted
from marl_core.registry.raised_from import in_brief, origin_and_notes, say_origin
from marl_core.registry.strategy import Adapter, AdvantageInputs, Estimator, Quantization, StopRun, Strategy

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from marl_core.bank.adapters import AdapterBank
    from marl_core.bank.views import ScoreView, View
    from marl_core.plan.chosen import Chosen
    from marl_core.plan.plan import Plan
    from marl_core.ppo.roles import ReferenceFunction, RewardFunction
    from marl_core.ppo.types import Evaluation, RunResult, ScoredRollout, StepStats

WEIGHT_WRITING_HOOKS = ("marl_prepare_base", "marl_reference", "marl_reward", "marl_update_end", "marl_restore")
"""Hooks that may change weights: they build what the run then stands on."""

STOPPING_HOOKS = ("marl_update_end", "marl_run_start", "marl_step_end", "marl_evaluation_end", "marl_evaluation")
"""Hooks that may give a StopRun; what another one gives of those that tell is ignored."""

RENAMED_HOOKS = {"marl_evaluation": ("marl_evaluation_end", "0.1")}
"""Old names that are still called, with what to write instead and the version that renamed them."""


class _Manager(pluggy.PluginManager):
    """Looks only at `marl_` attributes: pydantic's own are many, and some warn when read."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> pluggy.HookimplOpts | None:
        return super().parse_hookimpl_opts(plugin, name) if name.startswith("marl_") else None


class Hooks:
    """One method per hook, with real types. What a plugin raises or returns wrongly becomes a PluginError naming it."""

    def __init__(
        self, strategies: Iterable[tuple[Strategy, str]], places: Mapping[KeyPath, Strategy] | None = None
    ) -> None:
        """Register the strategies with their origins, in this order. Raises PluginError for hooks that don't fit.

        `places`: each strategy by its path in the config, for messages that name its options.
        """
        self.around: Callable[..., AbstractContextManager[None]] = lambda origin, *, writes: nullcontext()
        """A context manager around each call: a run puts its plugin guard here, which sees what a plugin changes."""
        self.stop_reason: str | None = None
        """Why a strategy asked the run to stop, and which; None until one does."""
        self._manager = _Manager("marl")
        self._manager.add_hookspecs(MarlSpecs)
        self._origins: dict[Strategy, str] = {}
        self._keys = _keys(places or {})
        for strategy, origin in strategies:
            if strategy not in self._origins:
                self._register(strategy, origin)

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """All registered strategies, in order."""
        return tuple(self._origins)

    def origin(self, strategy: Strategy) -> str:
        """Who provides the strategy."""
        return self._origins[strategy]

    def key_of(self, strategy: Strategy, option: str) -> str:
        """The config key of one of its options: `reward.1.path`; without a known place, the option and whose it is."""
        _, key = self._keys.get(strategy, ("", ""))
        return f"{key}.{option}" if key else f"{option} of {self._origins[strategy]}"

    def implements(self, strategy: Strategy, hook: str) -> bool:
        """Whether this strategy has this hook, wrappers not counted."""
        return any(impl.plugin is strategy and not _wraps(impl) for impl in self._caller(hook).get_hookimpls())

    def check(self, plan: Chosen) -> list[MarlError]:
        """Every strategy's reasons why the run can't work, each naming the strategy; what one raises hides no other's."""
        findings: list[MarlError] = []
        for strategy in self._implementers("marl_check"):
            try:
                with self._blame(strategy, "marl_check"):
                    for result in self._call(strategy, "marl_check", plan=plan):
                        sentences = () if result is None else result
                        if isinstance(sentences, str) or not isinstance(sentences, Iterable):
                            raise self._wrong(strategy, "marl_check", sentences, "sentences: yield each as a string")
                        for sentence in sentences:  # one by one: a generator may raise after its first
                            told = self._with_own_key(strategy, str(sentence))
                            findings.append(ConfigError(f"{told} (says {self._origins[strategy]})"))
            except MarlError as error:
                findings.append(error)
        return findings

    def _with_own_key(self, strategy: Strategy, sentence: str) -> str:
        """A strategy names its options by its family's own key (`reward.target: ...`): the sentence with the key that they stand under."""
        family, key = self._keys.get(strategy, ("", ""))
        option = re.match(rf"{re.escape(family)}\.(\w+)", sentence) if family != key else None
        if option is None or option[1] not in type(strategy).model_fields:
            return sentence
        return f"{key}{sentence[len(family) :]}"

    def describe(self, strategy: Strategy, plan: Chosen) -> str | None:
        """What the strategy says of itself; None when it has no such hook or says nothing."""
        if not self.implements(strategy, "marl_describe"):
            return None
        result = self._first(strategy, "marl_describe", plan=plan)
        if not isinstance(result, str | None):
            raise self._wrong(strategy, "marl_describe", result, "a text, or None")
        return result

    def adapter(
        self,
        strategy: Strategy,
        layers: Mapping[str, tuple[int, ...]],
        shapes: Mapping[str, tuple[int, ...]],
        role: str,
    ) -> Adapter:
        """What is trained; what goes wrong when its config is made becomes a PluginError naming the strategy, too."""
        result = self._choose(strategy, "marl_adapter", layers=layers, shapes=shapes, role=role)
        if not isinstance(result, Adapter):
            raise self._wrong(strategy, "marl_adapter", result, "a marl_core.Adapter")

        def config() -> Any:
            with self._blame(strategy, "marl_adapter"):
                made = result.config()
            if not hasattr(made, "peft_type"):  # by duck: PeftConfig's module imports torch
                raise self._wrong(strategy, "Adapter.config of marl_adapter", made, "a peft.PeftConfig")
            return made

        return replace(result, config=config)

    def quantization(self, strategy: Strategy, compute_dtype: str) -> Quantization:
        """How the base is loaded."""
        result = self._choose(strategy, "marl_quantization", compute_dtype=compute_dtype)
        if not isinstance(result, Quantization):
            raise self._wrong(strategy, "marl_quantization", result, "a marl_core.Quantization")
        return result

    def prepare_base(self, strategy: Strategy, base: PreTrainedModel) -> PreTrainedModel:
        """The base to use: the given one when the strategy has no such hook or returns None."""
        result = self._first(strategy, "marl_prepare_base", base=base)
        if result is None:
            return base
        if not hasattr(result, "named_parameters"):
            raise self._wrong(strategy, "marl_prepare_base", result, "a model, or None to leave the base as it is")
        return result  # type: ignore[no-any-return]  # a model by duck: its class would import transformers

    def reference(
        self, strategy: Strategy, bank: AdapterBank, temperature: float = 1.0, policy: str = "policy"
    ) -> View | ReferenceFunction:
        """Which weights are the reference."""
        result = self._choose(strategy, "marl_reference", bank=bank, temperature=temperature, policy=policy)
        if not (callable(result) or hasattr(result, "adapter")):
            raise self._wrong(strategy, "marl_reference", result, "a View or a function of a Rollout")
        return result  # type: ignore[no-any-return]  # checked by duck: View's module imports torch

    def reward(
        self, strategy: Strategy, bank: AdapterBank, tokenizer: PreTrainedTokenizerBase
    ) -> ScoreView | RewardFunction:
        """What scores a response."""
        result = self._choose(strategy, "marl_reward", bank=bank, tokenizer=tokenizer)
        if not (callable(result) or hasattr(result, "head")):
            raise self._wrong(strategy, "marl_reward", result, "a ScoreView or a function of a Rollout")
        return result  # type: ignore[no-any-return]  # checked by duck: ScoreView's module imports torch

    def advantage(self, strategy: Strategy) -> Estimator:
        """How rewards become advantages; what goes wrong when it estimates becomes a PluginError naming the strategy, too."""
        result = self._choose(strategy, "marl_advantage")
        if not isinstance(result, Estimator):
            raise self._wrong(strategy, "marl_advantage", result, "a marl_core.Estimator")

        def estimate(inputs: AdvantageInputs) -> Tensor | tuple[Tensor, Tensor]:
            with self._blame(strategy, "marl_advantage"):
                return result.estimate(inputs)

        return replace(result, estimate=estimate, origin=self._origins[strategy])

    def update_end(self, step: int, bank: AdapterBank, policy: str) -> None:
        """Tell the strategies that an update ended."""
        self._tell("marl_update_end", step=step, bank=bank, policy=policy)

    def state(self, strategy: Strategy, bank: AdapterBank, policy: str) -> Mapping[str, Tensor]:
        """What a checkpoint keeps of this strategy: tensors by name, none when it needs nothing."""
        if not self.implements(strategy, "marl_state"):
            return {}
        result = self._first(strategy, "marl_state", bank=bank, policy=policy)
        tensors = {} if result is None else result
        if not isinstance(tensors, Mapping) or not all(hasattr(value, "detach") for value in tensors.values()):
            raise self._wrong(strategy, "marl_state", result, "tensors by name, or None")
        return tensors

    def restore(self, strategy: Strategy, state: Mapping[str, Tensor], bank: AdapterBank, policy: str) -> None:
        """Hand back what `state` gave."""
        self._first(strategy, "marl_restore", state=state, bank=bank, policy=policy)

    def run_start(self, plan: Plan, done: int, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Tell the observers that the run begins."""
        self._tell("marl_run_start", plan=plan, done=done, tokenizer=tokenizer)

    def step_end(self, stats: StepStats, scored: ScoredRollout) -> None:
        """Tell the observers that a step ended."""
        self._tell("marl_step_end", stats=stats, scored=scored)

    def progress(self, phase: str, done: int, total: int) -> None:
        """Tell the observers how far a phase of the step is."""
        self._tell("marl_progress", phase=phase, done=done, total=total)

    def evaluation_end(self, evaluation: Evaluation, bank: AdapterBank, policy: str) -> None:
        """Tell the observers what was measured on the held-out prompts, by the hook's new and old name."""
        self._tell("marl_evaluation_end", evaluation=evaluation, bank=bank, policy=policy)
        self.evaluation(evaluation)

    def evaluation(self, evaluation: Evaluation) -> None:
        """Tell those that have the hook under its old name."""
        self._tell("marl_evaluation", evaluation=evaluation)

    def run_end(self, result: RunResult) -> None:
        """Tell the observers that the run ended: all of them, and then raise what the first of them raised."""
        errors = self._tell_all("marl_run_end", result=result)
        if errors:
            raise errors[0]

    def run_failed(self, step: int, error: BaseException) -> None:
        """Tell all observers that the run ended by `error`; what they raise is a warning, `error` goes on."""
        for failure in self._tell_all("marl_run_failed", step=step, error=error):
            warn(str(failure))

    def _register(self, strategy: Strategy, origin: str) -> None:
        name = origin
        if (
            name in self._origins.values()
        ):  # the same strategy once more: told apart by its key, and without one by its number
            _, key = self._keys.get(strategy, ("", ""))
            name = f"{origin}, {key}" if key else f"{origin} [{len(self._origins) + 1}]"
        for hook, spec in _specs().items():
            if (problem := _parameter_problem(getattr(type(strategy), hook, None), spec)) is not None:
                raise PluginError(f"{origin}: {hook}: {problem}")
        try:
            self._manager.register(strategy, name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(f"{origin}: {_explain(str(error))}") from error
        self._origins[strategy] = name
        for old, (new, since) in RENAMED_HOOKS.items():
            if self.implements(strategy, old):
                message = f"{name}: the hook {old} is deprecated since {since} and gone in {gone_in(since)}: use {new}"
                warn(message, MarlDeprecationWarning)

    def _caller(self, hook: str) -> pluggy.HookCaller:
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        return caller

    def _implementers(self, hook: str) -> list[Strategy]:
        return [strategy for strategy in self._origins if self.implements(strategy, hook)]

    def _call(self, strategy: Strategy, hook: str, **arguments: Any) -> Any:
        """Call one hook on one strategy; other strategies' wrappers around it take part."""
        impls = self._caller(hook).get_hookimpls()
        others = [impl.plugin for impl in impls if impl.plugin is not strategy and not _wraps(impl)]
        return self._manager.subset_hook_caller(hook, others)(**arguments)

    def _first(self, strategy: Strategy, hook: str, **arguments: Any) -> Any:
        with self._blame(strategy, hook):
            return self._call(strategy, hook, **arguments)

    def _choose(self, strategy: Strategy, hook: str, **arguments: Any) -> Any:
        if not self.implements(strategy, hook):
            raise PluginError(
                f"{self._origins[strategy]} has no {hook} hook, so it can't be used here. See docs/hooks.md."
            )
        result = self._first(strategy, hook, **arguments)
        if result is None:
            raise PluginError(
                f"{self._origins[strategy]}: {hook} gave None, but this hook must give a result. See docs/hooks.md."
            )
        return result

    def _tell(self, hook: str, **arguments: Any) -> None:
        for strategy in self._implementers(hook):
            for result in self._first(strategy, hook, **arguments):
                if not isinstance(result, StopRun):  # pluggy leaves out each None
                    if hook in STOPPING_HOOKS:
                        raise self._wrong(strategy, hook, result, "None or a marl_core.StopRun")
                    continue
                if self.stop_reason is None and hook in STOPPING_HOOKS:
                    self.stop_reason = f"{result.reason} ({self._origins[strategy]})"

    def _tell_all(self, hook: str, **arguments: Any) -> list[MarlError]:
        """Tell every strategy, even when others raise; returns what they raised."""
        errors: list[MarlError] = []
        for strategy in self._implementers(hook):
            try:
                self._first(strategy, hook, **arguments)
            except MarlError as error:
                errors.append(error)
        return errors

    @contextmanager
    def _blame(self, strategy: Strategy, hook: str) -> Iterator[None]:
        try:
            with self.around(self._origins[strategy], writes=hook in WEIGHT_WRITING_HOOKS):
                yield
        except (Stopped, MarlWarning, KeyboardInterrupt):  # a warning of ours, where somebody makes them errors
            raise
        except MarlError as error:  # of marl, which may not know who called it
            if error.args and isinstance(error.args[0], str):
                error.args = (self._with_own_key(strategy, error.args[0]), *error.args[1:])
            say_origin(error, f"{hook} of {self._origins[strategy]}", type(strategy))
            raise
        except BaseException as error:
            place = "".join(f"{sentence}. " for sentence in origin_and_notes(error, type(strategy)))
            shows = "more" if place else "where"
            raise PluginError(
                f"{self._origins[strategy]}: {hook} failed: {in_brief(error)}. {place}The traceback{in_words(' (--debug)', '')} "
                f"shows {shows}; "
                "if the options are right, report it to the plugin's authors."
            ) from error

    def _wrong(self, strategy: Strategy, hook: str, result: object, expected: str) -> PluginError:
        return PluginError(f"{self._origins[strategy]}: {hook} gave a {type(result).__name__}, expected {expected}.")


def _keys(places: Mapping[KeyPath, Strategy]) -> dict[Strategy, tuple[str, str]]:
    """Of each strategy its family's own key and the key that it stands under: `reward` and `eval.judges.x`.

    One that is alone in its list stands under the list's key, as people write it.
    """
    keys: dict[Strategy, tuple[str, str]] = {}
    for family, key in family_keys():
        path = tuple(key.path.split("."))
        members = [(found, strategy) for found, strategy in places.items() if found[: len(path)] == path]
        for found, strategy in members:
            is_alone = key.many == "list" and len(members) == 1
            keys.setdefault(strategy, (family.key.path, key.path if is_alone else dotted(found)))
    return keys


def _wraps(impl: pluggy.HookImpl) -> bool:
    return impl.wrapper or impl.hookwrapper


def _specs() -> dict[str, list[str]]:
    """The arguments that each hook may take."""
    return {
        name: [parameter for parameter in inspect.signature(spec).parameters if parameter != "self"]
        for name, spec in vars(MarlSpecs).items()
        if name.startswith("marl_")
    }


def _parameter_problem(method: object, arguments: list[str]) -> str | None:
    """A parameter that pluggy, which hands over arguments by their names alone, would leave empty; None when there is none."""
    if not callable(method) or not hasattr(method, "marl_impl"):
        return None
    named = f"name those you need: {', '.join(arguments)}" if arguments else "this hook has no arguments"
    for parameter in inspect.signature(method).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            stars = "**" if parameter.kind is parameter.VAR_KEYWORD else "*"
            return f"{stars}{parameter.name} gets nothing; {named}."
        if parameter.name in arguments and parameter.kind is parameter.KEYWORD_ONLY:
            return f"{parameter.name} gets nothing, because it stands behind a *; leave the * out."
        if parameter.name in arguments and parameter.default is not parameter.empty:
            return f"{parameter.name} gets nothing but its default; write it without one."
    return None


def _explain(message: str) -> str:
    """pluggy's message on one line, with the near match or the arguments that the hook has."""
    text = " ".join(message.split())
    match = re.search(r"hook '(\w+)'", text)
    specs = _specs()
    hook = match.group(1) if match else ""
    if hook in specs:
        return f"{text}. {hook} may take: {', '.join(specs[hook])}."
    near = near_match(hook, specs)
    return f"{text}. {f'Did you mean {near}?' if near else 'Known: ' + ', '.join(specs) + '.'} See docs/hooks.md."
