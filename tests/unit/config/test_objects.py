"""A strategy given as an object in Python is as good as its name in YAML: the same findings, warnings, words and estimates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marl_core import Catalog, Plan, Quantization, RunConfig, Strategy, hookimpl
from marl_core.plan.describe import explain
from marl_core.plan.memory import estimate
from marl_core.testing import write_tiny_model
from marl_plugins.observers import Console, JsonLines
from marl_plugins.quantization import Bnb4Bit, Bnb8Bit, NoQuantization
from marl_plugins.reference import DisabledAdapter, NoReference
from marl_plugins.reference_moving import EmaAdapter
from marl_plugins.reward import FunctionReward
from marl_plugins.reward_text import LengthFormat


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_tiny_model(folder)
    return folder


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    (tmp_path / "mine.py").write_text("def score(completions, **columns): return [0.0 for _ in completions]\n")
    return {
        "model": {"path": str(base), "dtype": "float32"},
        "reference": "disabled-adapter",
        "reward": {"use": "function", "target": f"{tmp_path}/mine.py:score"},
        "data": {"prompts": f"{tmp_path}/prompts.jsonl", "max_prompt_tokens": 8},
    }


def told(settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that is said of a plan."""
    plan = Plan.of(RunConfig.model_validate(settings), Catalog.installed())
    memory = estimate(plan)
    return {
        "check": plan.check(),
        "warnings": plan.warnings(),
        "roles": plan.describe(),
        "explain": explain(plan),
        "memory": (memory.roles, memory.peak),
        "origins": [plan.hooks.origin(strategy) for strategy in plan.hooks.strategies],
        "labels": [choice.label for choice in (plan.config.quantization, plan.config.reference, *plan.config.reward)],
    }


PAIRS: dict[str, tuple[dict[str, Any], Callable[[str], dict[str, Any]]]] = {
    "none": ({"quantization": "none"}, lambda target: {"quantization": NoQuantization()}),
    "bnb-4bit": ({"quantization": "bnb-4bit"}, lambda target: {"quantization": Bnb4Bit()}),
    "bnb-8bit": (
        {"quantization": {"use": "bnb-8bit", "threshold": 6.0}},
        lambda target: {"quantization": Bnb8Bit(threshold=6.0)},
    ),
    "reference": ({}, lambda target: {"reference": DisabledAdapter()}),
    "no reference": ({"reference": "none"}, lambda target: {"reference": NoReference()}),
    "moving reference": ({"reference": {"use": "ema-adapter"}}, lambda target: {"reference": EmaAdapter()}),
    "function": ({}, lambda target: {"reward": FunctionReward(target=target)}),
    "weighed": (
        {"reward": [{"use": "length-format", "max_tokens": 20, "weight": 0.5}]},
        lambda target: {"reward": [{"use": LengthFormat(max_tokens=20), "weight": 0.5}]},
    ),
    "observers": (
        {"observers": ["console", "json-lines"]},
        lambda target: {"observers": [Console(), JsonLines()]},
    ),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("name", PAIRS)
def test_an_object_is_its_name(name: str, compiled: bool, settings: dict[str, Any]) -> None:
    by_name, by_object = PAIRS[name]
    settings = settings | {"speed": {"compile": compiled}}
    assert told(settings | by_name) == told(settings | by_object(settings["reward"]["target"]))


class Settled(Strategy):
    """A stranger's way of holding the base, that changes it once it is loaded."""

    @hookimpl
    def marl_quantization(self) -> Quantization:
        return Quantization(after_load=lambda model: None)


class Plain(Strategy):
    """A stranger's that does nothing."""

    @hookimpl
    def marl_quantization(self) -> Quantization:
        return Quantization()


@pytest.mark.parametrize(("held", "refused"), [(Settled(), True), (Plain(), False), (Bnb4Bit(), True)])
def test_compile_asks_what_the_quantization_does(held: Strategy, refused: bool, settings: dict[str, Any]) -> None:
    found = told(settings | {"quantization": held, "speed": {"compile": True}})["check"]
    assert any("speed.compile" in line for line in found) == refused


def test_a_class_that_nobody_announces_goes_by_its_own_name(settings: dict[str, Any]) -> None:
    assert told(settings | {"quantization": Plain()})["labels"][0] == "Plain"


def test_the_two_ways_run_alike(settings: dict[str, Any]) -> None:
    """The sources' names in the metrics, too."""
    from marl_core import Runner

    small = {
        "sampling": {"max_new_tokens": 4},
        "ppo": {"steps": 1, "batch": 2, "minibatch": 2, "epochs": 1},
        "run": {"device": "cpu"},
        "policy": {"r": 2},
    }
    reward = settings["reward"]["target"]
    two = [
        {},
        {"reward": [FunctionReward(target=reward)], "reference": DisabledAdapter(), "quantization": NoQuantization()},
    ]
    found = [
        next(iter(Runner(RunConfig.model_validate(settings | small | changes)).steps())).metrics for changes in two
    ]
    timed = {name for name in found[0] if name.startswith("perf/")}
    one, other = ({name: value for name, value in run.items() if name not in timed} for run in found)
    assert one == other
