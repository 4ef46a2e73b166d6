"""The typed front: who is called, what is refused, who is blamed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from marl_core import ConfigError, DataError, PluginError, Quantization, Strategy, hookimpl
from marl_core.registry.hooks import Hooks


class Source(Strategy):
    result: Any = None

    @hookimpl
    def marl_reward(self) -> Any:
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result

    @hookimpl
    def marl_reference(self) -> Any:
        return self.result

    @hookimpl
    def marl_quantization(self) -> Any:
        return self.result


class Watcher(Strategy):
    number: int = 0
    hear: Callable[[Any], None] = print

    @hookimpl
    def marl_run_start(self, plan: Any) -> None:
        self.hear((self.number, plan))

    @hookimpl
    def marl_step_end(self, stats: Any) -> None:
        self.hear((self.number, stats))

    @hookimpl
    def marl_run_end(self, result: Any) -> None:
        self.hear((self.number, result))


class Doubtful(Strategy):
    said: Any

    @hookimpl
    def marl_check(self, plan: Any) -> Any:
        return self.said


def hooks_of(*strategies: Strategy) -> Hooks:
    return Hooks((strategy, f"s{index} of acme 1.0") for index, strategy in enumerate(strategies))


def call(hooks: Hooks, strategy: Strategy) -> Any:
    return hooks.reward(strategy, None, None)  # type: ignore[arg-type]  # no bank in a light test


def test_a_family_hook_is_called_on_one_strategy_only() -> None:
    one, two = Source(result=len), Source(result=abs)
    hooks = hooks_of(one, two)
    assert call(hooks, one) is len
    assert call(hooks, two) is abs
    assert hooks.origin(two) == "s1 of acme 1.0"
    assert hooks.strategies == (one, two)


def test_the_same_object_in_two_places_is_registered_once() -> None:
    one = Source(result=len)
    assert hooks_of(one, one).strategies == (one,)


def test_two_of_one_origin_stay_apart() -> None:
    hooks = Hooks((strategy, "function of acme") for strategy in (Source(result=len), Source(result=abs)))
    assert [call(hooks, strategy) for strategy in hooks.strategies] == [len, abs]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "s0 of acme 1.0: marl_reward gave None"),
        (1.5, "s0 of acme 1.0: marl_reward gave a float, expected a ScoreView"),
    ],
)
def test_wrong_results_are_refused(result: object, message: str) -> None:
    strategy = Source(result=result)
    with pytest.raises(PluginError, match=message):
        call(hooks_of(strategy), strategy)


def test_reference_and_quantization_are_checked_too() -> None:
    strategy = Source(result="base")
    hooks = hooks_of(strategy)
    with pytest.raises(PluginError, match=r"marl_reference gave a str, expected a View"):
        hooks.reference(strategy, None)  # type: ignore[arg-type]  # no bank in a light test
    with pytest.raises(PluginError, match=r"marl_quantization gave a str, expected a marl_core.Quantization"):
        hooks.quantization(strategy, "float32")
    plain = Source(result=Quantization())
    assert hooks_of(plain).quantization(plain, "float32") == Quantization()


def test_a_strategy_without_the_hook_is_refused() -> None:
    watcher = Watcher()
    with pytest.raises(PluginError, match=r"has no marl_reward hook"):
        call(hooks_of(watcher, Source(result=len)), watcher)


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), SystemExit(3)])
def test_what_a_plugin_raises_is_named_as_its_own(error: BaseException) -> None:
    strategy = Source(result=error)
    with pytest.raises(PluginError, match=r"s0 of acme 1.0: marl_reward failed: ") as caught:
        call(hooks_of(strategy), strategy)
    assert caught.value.__cause__ is error


def test_marls_own_errors_pass_through() -> None:
    error = DataError("reward.path: missing")
    strategy = Source(result=error)
    with pytest.raises(DataError) as caught:
        call(hooks_of(strategy), strategy)
    assert caught.value is error


def test_prepare_base_leaves_the_base_when_there_is_no_such_hook() -> None:
    strategy = Source(result=len)
    hooks = hooks_of(strategy)
    base: Any = object()
    assert hooks.prepare_base(strategy, base) is base
    assert not hooks.implements(strategy, "marl_prepare_base")
    assert hooks.implements(strategy, "marl_reward")


def test_observers_hear_everything_in_order() -> None:
    seen: list[Any] = []
    hooks = hooks_of(Watcher(number=0, hear=seen.append), Source(result=len), Watcher(number=1, hear=seen.append))
    plan: Any = "plan"
    hooks.run_start(plan, 0)
    hooks.step_end(1, 2)  # type: ignore[arg-type]  # any object will do
    hooks.run_end("end")  # type: ignore[arg-type]  # any object will do
    assert seen == [(0, "plan"), (1, "plan"), (0, 1), (1, 1), (0, "end"), (1, "end")]


def sentences() -> Iterator[str]:
    yield "one"
    yield "two"


@pytest.mark.parametrize(
    ("said", "expected"), [(None, []), ([], []), (["one"], ["one"]), (sentences(), ["one", "two"])]
)
def test_check_collects_sentences(said: Iterable[str] | None, expected: list[str]) -> None:
    plan: Any = None
    found = [str(finding) for finding in hooks_of(Doubtful(said=said)).check(plan)]
    assert found == [f"{sentence} (says s0 of acme 1.0)" for sentence in expected]


@pytest.mark.parametrize("said", ["a bare string", 3])
def test_check_refuses_what_is_no_list_of_sentences(said: object) -> None:
    plan: Any = None
    (finding,) = hooks_of(Doubtful(said=said)).check(plan)
    assert isinstance(finding, PluginError)
    assert re.search(r"marl_check gave a (str|int), expected sentences", str(finding))


def test_what_one_strategy_raises_hides_no_other() -> None:
    plan: Any = None

    def breaks() -> Iterator[str]:
        yield "first"
        raise DataError("a file is gone")

    found = hooks_of(Doubtful(said=breaks()), Doubtful(said=["second"])).check(plan)
    assert [type(finding) for finding in found] == [ConfigError, DataError, ConfigError]
    assert [str(finding).split(" (")[0] for finding in found] == ["first", "a file is gone", "second"]


def test_an_unknown_hook_gets_a_near_match() -> None:
    class Misspelt(Strategy):
        @hookimpl
        def marl_rewrad(self) -> None: ...

    with pytest.raises(
        PluginError, match=r"s0 of acme 1\.0: .*unknown hook 'marl_rewrad'.* Did you mean marl_reward\?"
    ):
        hooks_of(Misspelt())


def test_an_argument_that_does_not_exist_is_named_with_those_that_do() -> None:
    class Greedy(Strategy):
        @hookimpl
        def marl_reward(self, bank: Any, colour: Any) -> None: ...

    with pytest.raises(PluginError, match=r"colour.*marl_reward may take: bank, tokenizer\."):
        hooks_of(Greedy())


def test_another_strategys_wrapper_takes_part() -> None:
    class Twice(Strategy):
        @hookimpl(wrapper=True)
        def marl_reward(self) -> Iterator[None]:
            inner: Any = yield
            return lambda rollout: 2 * inner(rollout)  # type: ignore[return-value]  # a wrapper returns the result

    source = Source(result=abs)
    assert call(hooks_of(source, Twice()), source)(-3) == 6


def test_methods_that_do_not_begin_with_marl_are_not_looked_at() -> None:
    class Odd(Strategy):
        @hookimpl
        def helper(self, anything: Any) -> None: ...

    assert hooks_of(Odd()).strategies
