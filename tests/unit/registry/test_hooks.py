"""The typed front: who is called, what is refused, who is blamed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from marl_core import ConfigError, DataError, PluginError, Quantization, StopRun, Strategy, hookimpl
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


@pytest.mark.parametrize("hook", ["marl_run_start", "marl_step_end", "marl_update_end", "marl_evaluation_end"])
def test_what_is_neither_none_nor_a_stop_is_refused(hook: str) -> None:
    said: list[Any] = [None]

    def told(self: Strategy) -> Any:
        return said[0]

    watcher = type("Asker", (Strategy,), {hook: hookimpl(told)})()
    hooks = hooks_of(watcher)
    calls: dict[str, Callable[[], None]] = {
        "marl_run_start": lambda: hooks.run_start(None, 0),  # type: ignore[arg-type]  # any object will do
        "marl_step_end": lambda: hooks.step_end(None, None),  # type: ignore[arg-type]
        "marl_update_end": lambda: hooks.update_end(1, None, "policy"),  # type: ignore[arg-type]
        "marl_evaluation_end": lambda: hooks.evaluation_end(None, None, "policy"),  # type: ignore[arg-type]
    }
    calls[hook]()
    assert hooks.stop_reason is None
    said[0] = "stop"
    with pytest.raises(PluginError, match=rf"{hook} gave a str, expected None or a marl_core.StopRun"):
        calls[hook]()
    said[0] = StopRun("enough")
    calls[hook]()
    assert hooks.stop_reason == "enough (s0 of acme 1.0)"


def test_what_the_others_give_is_ignored() -> None:
    class Chatty(Strategy):
        @hookimpl
        def marl_progress(self) -> str:
            return "going on"

        @hookimpl
        def marl_run_end(self) -> StopRun:
            return StopRun("too late")

    hooks = hooks_of(Chatty())
    hooks.progress("sampling", 0, 1)
    hooks.run_end(None)  # type: ignore[arg-type]
    assert hooks.stop_reason is None


class Everything(Strategy):
    @hookimpl
    def marl_progress(self, **kw: Any) -> None: ...


class Starred(Strategy):
    @hookimpl
    def marl_progress(self, *rest: Any) -> None: ...


class Optional(Strategy):
    @hookimpl
    def marl_step_end(self, stats: Any, scored: Any = None) -> None: ...


class ByName(Strategy):
    @hookimpl
    def marl_step_end(self, *, stats: Any) -> None: ...


class OwnDefault(Strategy):
    """A default that is no argument of the hook is the author's business."""

    @hookimpl
    def marl_step_end(self, stats: Any, digits: int = 3) -> None: ...


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Everything, r"s0 of acme 1.0: marl_progress: \*\*kw gets nothing; name those you need: phase, done, total\."),
        (Starred, r"marl_progress: \*rest gets nothing"),
        (Optional, r"marl_step_end: scored gets nothing but its default; write it without one"),
        (ByName, r"marl_step_end: stats gets nothing, because it stands behind a \*"),
    ],
)
def test_parameters_that_would_stay_empty_are_refused(strategy: type[Strategy], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        hooks_of(strategy())
    assert hooks_of(OwnDefault()).strategies


def test_an_error_of_marl_names_the_plugin_that_asked_and_its_line() -> None:
    class Asks(Strategy):
        @hookimpl
        def marl_reward(self) -> Any:
            raise ConfigError("There is no adapter 'polcy'.")  # in place of a call of marl's

    strategy = Asks()
    with pytest.raises(ConfigError) as caught:
        call(hooks_of(strategy), strategy)
    said = str(caught.value)
    assert said.startswith("There is no adapter 'polcy'. (In marl_reward of s0 of acme 1.0. It was raised from ")
    assert "test_hooks.py, line" in said
    assert said.count("It was raised from") == 1


def test_code_that_is_not_python_is_named_by_its_place(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_written.py").write_text("x = 1\ny = [1, 2\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    class Late(Strategy):
        @hookimpl
        def marl_reward(self) -> Any:
            import half_written  # type: ignore[import-not-found]

            return half_written.x

    strategy = Late()
    with pytest.raises(PluginError, match=r"failed: SyntaxError: half_written\.py, line 2: '\[' was never closed\. "):
        call(hooks_of(strategy), strategy)


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
