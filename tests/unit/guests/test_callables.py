"""A function in Python is a reward, a judge, a process reward: how it is written down, found again, and executed once."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError

from marl_core import Catalog, ConfigError, Plan, PluginError, RunConfig, callable_name, dump_config, load_config
from marl_core.config.schema import json_schema
from marl_core.registry.callables import callable_source
from marl_core.store.input_files import named
from marl_core.testing import check_strategy, fake_rollout, tiny_tokenizer
from marl_plugins.function_target import load, problems
from marl_plugins.reference import DisabledAdapter
from marl_plugins.reward import FunctionReward
from marl_plugins.reward_function import wrap
from marl_plugins.reward_process import ProcessReward

HERE = __name__


def length(completions: list[str], **columns: Any) -> list[float]:
    """How long each is."""
    return [float(len(text)) for text in completions]


async def later(completions: list[str]) -> list[float]:
    """The same, awaited."""
    return length(completions)


def given(completions: list[str], town: str, factor: float = 1.0) -> list[float]:
    """What it is given of a column that a partial binds."""
    return [factor * len(town)] * len(completions)


class Scorer:
    """An instance that is called, and methods of both kinds."""

    def __call__(self, completions: list[str]) -> list[float]:
        """The length."""
        return length(completions)

    def method(self, completions: list[str], **columns: Any) -> list[float]:
        """The length."""
        return length(completions)

    @classmethod
    def of_class(cls, completions: list[str]) -> list[float]:
        """The length."""
        return length(completions)

    @staticmethod
    def static(completions: list[str]) -> list[float]:
        """The length."""
        return length(completions)


def inner() -> Callable[..., Any]:
    """A function inside of a function."""
    return lambda completions: length(completions)


CALLABLES: dict[str, tuple[Callable[..., Any], str, str | None]] = {
    "function": (length, f"{HERE}:length", "length"),
    "async": (later, f"{HERE}:later", "later"),
    "instance": (Scorer(), f"{HERE}:Scorer()", "Scorer"),
    "class": (Scorer, f"{HERE}:Scorer", "Scorer"),
    "method": (Scorer().method, f"{HERE}:Scorer().method", "method"),
    "class method": (Scorer.of_class, f"{HERE}:Scorer.of_class", "of_class"),
    "static method": (Scorer.static, f"{HERE}:Scorer.static", "static"),
    "partial": (functools.partial(length, factor=2), f"functools.partial({HERE}:length)", "length"),
    "lambda": (inner(), f"{HERE}:inner.<locals>.<lambda>", None),
}


def config(reward: Any, **more: Any) -> RunConfig:
    return RunConfig(model={"path": "m"}, reference="disabled-adapter", reward=reward, **more)


@pytest.mark.parametrize("kind", CALLABLES)
def test_each_kind_is_written_called_and_named(kind: str) -> None:
    function, name, short = CALLABLES[kind]
    made = config(function)
    assert callable_name(function) == name
    assert f"  target: {name}\n" in dump_config(made)
    assert made.reward[0].name == short
    assert RunConfig.model_validate(made.model_dump(by_alias=True)) == made  # in Python the function itself stays
    plan = Plan.of(made)
    assert plan.check() == []
    score = plan.hooks.reward(plan.rewards[0][1], None, None)  # type: ignore[arg-type]
    assert list(score(fake_rollout([("q", "abc"), ("q", "a")]))) == [3.0, 1.0]  # type: ignore[operator]
    check_strategy("reward", FunctionReward(target=function))


def test_the_places_where_one_may_stand() -> None:
    made = config(
        [length, {"use": later, "weight": 0.5}, {"use": Scorer(), "name": "mine"}, FunctionReward(target=length)],
        eval={"prompts": "p.jsonl", "judges": {"a": length, "b": {"use": given, "arguments": {"town": "Rome"}}}},
    )
    assert [(choice.label, choice.name, choice.weight) for choice in made.reward] == [
        ("function", "length", 1.0),
        ("function", "later", 0.5),
        ("function", "mine", 1.0),
        ("FunctionReward", None, 1.0),
    ]
    plan = Plan.of(made)
    assert [getattr(strategy, "target") for _, strategy in plan.rewards][::3] == [length, length]  # noqa: B009  # any strategy's
    assert plan.judges["b"][1].model_dump() == {"target": given, "arguments": {"town": "Rome"}, "timeout_seconds": None}
    assert f"target: {HERE}:length" in dump_config(made).split("judges:")[1]


def test_a_process_reward() -> None:
    def steps(completions: list[str], steps: list[list[str]]) -> list[list[float]]:
        return [[float(len(step)) for step in each] for each in steps]

    strategy = ProcessReward(target=steps)
    plan = Plan.of(config(strategy))
    assert "<locals>.steps: a score for each step" in str(plan.hooks.describe(strategy, plan))
    assert '"target":"' + callable_name(steps) in strategy.model_dump_json()
    score = plan.hooks.reward(strategy, None, tiny_tokenizer())  # type: ignore[arg-type]
    assert score(fake_rollout([("q", "a\nbc"), ("q", "d")])) == [[0.0, 2.0, 0.0, 0.0, 2.0], [1.0]]  # type: ignore[operator]


def test_what_a_partial_binds_no_column_replaces() -> None:
    rollout = fake_rollout([("q", "a")], [{"town": "Oslo", "factor": 9.0}])
    assert wrap(functools.partial(given, town="Vienna", factor=2.0), {})(rollout) == [12.0]


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (3, "give a strategy's name, or {use: name, option: value}, or in Python a function; this is 3"),
        ({"use": 3}, "should be a valid string"),
        ([length, None], "or in Python a function; this is None"),
        (FunctionReward, "FunctionReward is a class; give a strategy made of it: FunctionReward(...)"),
        ({"use": FunctionReward, "target": length}, "FunctionReward is a class"),
    ],
)
def test_what_is_no_reward(reward: Any, said: str) -> None:
    with pytest.raises((ValidationError, ConfigError)) as caught:
        config(reward)
    assert said.casefold() in str(caught.value).casefold()


def test_a_function_is_no_reference() -> None:
    with pytest.raises((ValidationError, ConfigError), match="a function can't stand for a reference"):
        RunConfig(model={"path": "m"}, reference=length, reward=length)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (3, "should be a function, or its name as `file.py:function`, but 3 was given"),
        ("rewards.py", "should be `package.module:function` or `file.py:function`, but 'rewards.py' was given"),
        (FunctionReward(target="a:b"), "FunctionReward is a strategy, not a function"),
        *(
            (name, "was an object in a Python program")
            for _, name, _ in CALLABLES.values()
            if "(" in name or "<" in name
        ),
    ],
)
def test_what_is_no_target(target: Any, said: str) -> None:
    with pytest.raises((ValidationError, ConfigError)) as caught:
        FunctionReward(target=target)
    assert said in str(caught.value)


class TestReadBack:
    """A config that Python has written, read from a file."""

    def write(self, folder: Path, reward: Any) -> Path:
        file = folder / "config.yaml"
        file.write_text(dump_config(config(reward)), encoding="utf-8")
        return file

    @pytest.mark.parametrize("kind", ["function", "async", "class", "class method", "static method"])
    def test_what_has_a_name_is_found_again(self, tmp_path: Path, kind: str) -> None:
        read = load_config(self.write(tmp_path, CALLABLES[kind][0]))
        plan = Plan.of(read)
        assert plan.check() == []
        score = plan.hooks.reward(plan.rewards[0][1], None, None)  # type: ignore[arg-type]
        assert list(score(fake_rollout([("q", "abc")]))) == [3.0]  # type: ignore[operator]

    @pytest.mark.parametrize("kind", ["instance", "method", "partial", "lambda"])
    def test_an_object_is_asked_for(self, tmp_path: Path, kind: str) -> None:
        with pytest.raises(ConfigError, match=r"reward\.0\.target: .*Start from that program, which has the object"):
            load_config(self.write(tmp_path, CALLABLES[kind][0]))

    def test_a_strategy_object_is_asked_for(self, tmp_path: Path) -> None:
        file = self.write(tmp_path, FunctionReward(target="rewards.py:f"))
        with pytest.raises(ConfigError, match=r"no reward strategy is called 'marl_plugins.*its name is 'function'"):
            load_config(file)
        file = self.write(tmp_path, "function")
        text = file.read_text(encoding="utf-8").replace("use: function", "use: acme:Mine")
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match="Start from the program that has the object"):
            load_config(file)

    def test_another_programs_function(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        command = ModuleType("__main__")
        command.__file__ = "/somewhere/bin/marl"
        monkeypatch.setitem(sys.modules, "__main__", command)
        (said,) = Plan.of(config({"use": "function", "target": "__main__:mine"})).check()
        assert "a function of the Python program that wrote this config" in said

    def test_the_schema_knows_the_name(self) -> None:
        options = json_schema(Catalog.installed())["$defs"]["reward:marl-core.function"]["properties"]
        assert options["target"]["type"] == "string"
        assert options["target"]["pattern"].startswith(".+:")


class TestRunningProgram:
    """The program that runs is never executed a second time."""

    @pytest.fixture
    def program(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        """A script that is running: it has counted itself, and has `f` but no `g` so far."""
        file = tmp_path / "train.py"
        file.write_text("raise SystemExit('executed a second time')\ndef f(): pass\ndef g(): pass\n", encoding="utf-8")
        main = ModuleType("__main__")
        main.__file__ = str(file)
        vars(main)["f"] = length
        vars(main)["Scorer"] = Scorer
        monkeypatch.setitem(sys.modules, "__main__", main)
        monkeypatch.delitem(sys.modules, "__mp_main__", raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.chdir(tmp_path)
        return main

    @pytest.mark.parametrize("location", ["__main__", "train.py", "./train.py", "train"])
    def test_by_each_of_its_names(self, program: ModuleType, location: str) -> None:
        assert list(problems(f"{location}:f")) == []
        assert load(f"{location}:f") is length
        assert load(f"{location}:Scorer.static") is Scorer.static
        (said,) = problems(f"{location}:g")
        assert said.endswith(
            "is the running program and has no function 'g' so far; define it above the line that makes the Runner"
        )
        with pytest.raises(ConfigError, match="define it above the line"):
            load(f"{location}:g")

    def test_through_a_link(self, program: ModuleType, tmp_path: Path) -> None:
        (tmp_path / "link.py").symlink_to(tmp_path / "train.py")
        assert load("link.py:f") is length

    def test_a_module_started_by_its_name(
        self, program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package = tmp_path / "acme_pkg"
        package.mkdir()
        for name in ("__init__.py", "train.py"):
            (package / name).write_text("" if name == "__init__.py" else "1 / 0\n", encoding="utf-8")
        monkeypatch.setitem(sys.modules, "acme_pkg", __import__("acme_pkg"))  # as `python -m` imports it
        program.__file__ = str(package / "train.py")
        assert load("acme_pkg.train:f") is length

    def test_in_a_spawned_process_while_its_program_is_executed(
        self, program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "__mp_main__", program)
        monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
        assert load("train.py:f") is length
        monkeypatch.setattr(length, "__module__", "__mp_main__")
        assert callable_name(length) == "__main__:length"

    def test_in_a_notebook(self, program: ModuleType) -> None:
        del program.__file__
        assert load("__main__:f") is length
        assert list(problems("train.py:f")) == []  # a file like any other

    def test_its_own_lines_are_its_source(self, program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its file is edited to go on: more steps, resume=True."""
        monkeypatch.setattr(length, "__module__", "__main__")
        assert str(callable_source(length)).startswith("def length(")
        by_object, by_name = named({"target": length}), named({"target": "__main__:f"})
        assert list(by_object) == ["__main__:length"]
        assert [*by_object.values()] == [*by_name.values()]


class TestFiles:
    """A file is executed once for each text it has had."""

    @pytest.fixture
    def file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        return tmp_path / "counted.py"

    def write(self, file: Path, more: str = "") -> None:
        count = "with open('count', 'a') as stream: stream.write('x')\n"
        file.write_text(
            f"{count}def f(completions): return [1.0]\ndef g(completions): return [2.0]\n{more}", encoding="utf-8"
        )

    def test_two_functions_of_one_file(self, file: Path) -> None:
        self.write(file)
        f, g = load("counted.py:f"), load(f"{file}:g")
        assert (f([]), g([])) == ([1.0], [2.0])
        assert Path("count").read_text() == "x"
        assert load("counted.py:f") is f

    def test_a_changed_file_is_executed_again(self, file: Path) -> None:
        self.write(file)
        load("counted.py:f")
        file.write_text(file.read_text().replace("1.0", "3.0"))  # same size, and perhaps the same second
        assert load("counted.py:f")([]) == [3.0]

    def test_a_file_that_fails_is_executed_again_when_it_is_asked_for_again(self, file: Path) -> None:
        self.write(file, "if not __import__('os').path.exists('ready'): raise OSError('not yet')\n")
        with pytest.raises(PluginError, match="not yet"):
            load("counted.py:f")
        Path("ready").touch()
        assert load("counted.py:f")([]) == [1.0]

    def test_threads_execute_it_once(self, file: Path) -> None:
        self.write(file, "import time; time.sleep(0.2)\n")
        found: list[Any] = []
        threads = [threading.Thread(target=lambda: found.append(load("counted.py:f"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        assert len(set(found)) == 1
        assert Path("count").read_text() == "x"

    def test_one_that_names_itself_is_refused_with_the_remedy(self, file: Path) -> None:
        self.write(file, "from marl_plugins.function_target import load\nload('counted.py:f')\n")
        with pytest.raises(
            PluginError, match=r"executed to find 'f' in it, and makes a Runner.*if __name__ == \"__main__\""
        ):
            load("counted.py:f")
        assert Path("count").read_text() == "x"

    def test_the_refusal_is_said_once_however_deep_it_was_met(self, file: Path) -> None:
        self.write(file, "from marl_plugins.function_target import load\nload('counted.py:f')\n")
        with pytest.raises(PluginError) as caught:
            load("counted.py:f")
        assert str(caught.value).count("counted.py") == 1
        assert "could not be imported" not in str(caught.value)

    @pytest.mark.parametrize(
        ("code", "line"),
        [
            ("import marl_core\nmarl_core.Runner(1).train()\n", 2),
            ("from marl_core import Runner\nwith Runner(1) as r:\n    pass\n", 2),
            ("from marl_core import Runner\nclass A:\n    r = Runner(1)\n", 3),
            ("from marl_core import Runner\ndef go():\n    Runner(1)\n", None),
            ("from marl_core import Runner\nif __name__ == '__main__':\n    Runner(1)\n", None),
        ],
    )
    def test_a_file_that_makes_a_runner_is_told_before_it_is_executed(
        self, tmp_path: Path, code: str, line: int | None
    ) -> None:
        trains = tmp_path / "trains.py"
        trains.write_text(f"{code}def f(completions):\n    return [0.0]\n", encoding="utf-8")
        found = list(problems(f"{trains}:f"))
        assert ["makes a Runner while that goes on" in said and f"(line {line})" in said for said in found] == (
            [] if line is None else [True]
        )

    @pytest.mark.parametrize("target", ["counted.py:f", "counted:f"])
    def test_one_that_is_being_imported_is_the_module_under_way(self, file: Path, target: str) -> None:
        self.write(file, f"from marl_plugins.function_target import load\nfound = load({target!r})\n")
        try:
            module = __import__("counted")
        finally:
            sys.modules.pop("counted", None)
        assert module.found is module.f
        assert Path("count").read_text() == "x"


def test_a_function_of_a_file_is_hashed_as_its_file() -> None:
    digests = named({"target": length, "arguments": {"x": [length]}})
    assert digests == {f"{HERE}:length": named(__file__)[__file__]}


@pytest.mark.parametrize("function", [len, functools.partial(len), eval("lambda completions: [0.0]")])
def test_of_a_source_that_isnt_known_nothing_is_said(function: Callable[..., Any]) -> None:
    assert named({"target": function}) == {}


def test_an_object_in_place_of_the_reference_stays() -> None:
    made = RunConfig(model={"path": "m"}, reference=DisabledAdapter(), reward=length)
    assert Plan.of(made).check() == []
