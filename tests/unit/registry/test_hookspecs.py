"""Each hook is documented in full, its example runs, and the typed front has the same arguments."""

from __future__ import annotations

import inspect
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import marl_core
from marl_core import Strategy
from marl_core.registry.hooks import Hooks
from marl_core.registry.hookspecs import MarlSpecs

HOOKS = [name for name in vars(MarlSpecs) if name.startswith("marl_")]
HEADINGS = ("Family:", "Called:", "Arguments:", "Result:", "Example:")


class Model:
    def named_parameters(self) -> list[Any]:
        return []

    def requires_grad_(self, flag: bool) -> Model:
        return self


CONFIG = SimpleNamespace(ppo=SimpleNamespace(steps=3), model=SimpleNamespace(path="m"))
ARGUMENTS: dict[str, Any] = {
    "plan": SimpleNamespace(config=CONFIG),
    "compute_dtype": "float32",
    "layers": {"q_proj": (8, 4)},
    "shapes": {"q_proj.weight": (8, 4)},
    "role": "policy",
    "base": Model(),
    "bank": SimpleNamespace(tensors=lambda name: {name: torch.zeros(1)}),
    "temperature": 1.0,
    "policy": "policy",
    "step": 1,
    "state": {"mine": 0},
    "tokenizer": object(),
    "done": 0,
    "total": 8,
    "phase": "sampling",
    "stats": SimpleNamespace(step=1, kl_nats=0.5),
    "scored": object(),
    "result": "result",
    "evaluation": SimpleNamespace(step=1, reward=0.5),
    "error": RuntimeError("the disk is gone"),
}


def doc(hook: str) -> str:
    return inspect.cleandoc(getattr(MarlSpecs, hook).__doc__)


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "strategy")]


@pytest.mark.parametrize("hook", HOOKS)
def test_documented_in_full(hook: str) -> None:
    places = [doc(hook).find(f"\n{heading}") for heading in HEADINGS]
    assert all(place > 0 for place in places), f"{hook} lacks {HEADINGS[places.index(-1)]}"
    assert places == sorted(places)
    for name in parameters(getattr(MarlSpecs, hook)):
        assert f"\n    {name}: " in doc(hook), f"{hook} doesn't explain {name}"


@pytest.mark.filterwarnings("ignore:.*hook marl_evaluation is deprecated")
@pytest.mark.parametrize("hook", HOOKS)
def test_example_runs(hook: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = textwrap.dedent(doc(hook).split("Example:\n", 1)[1])
    assert len(example.splitlines()) <= 7
    names = {
        name: getattr(marl_core, name)
        for name in ("Adapter", "Strategy", "hookimpl", "Estimator", "Quantization", "StopRun", "View")
    }
    exec(compile("from __future__ import annotations\n" + example, hook, "exec"), names)
    strategy_class: Any = next(reversed(names.values()))
    strategy: Strategy = strategy_class()
    hooks = Hooks([(strategy, "the example")])
    front = getattr(hooks, hook.removeprefix("marl_"))
    arguments = {name: ARGUMENTS[name] for name in parameters(front)}
    takes_strategy = "strategy" in inspect.signature(front).parameters
    result = front(strategy, **arguments) if takes_strategy else front(**arguments)
    assert result or capsys.readouterr().out


@pytest.mark.parametrize("hook", HOOKS)
def test_front_has_the_specs_arguments(hook: str) -> None:
    front = getattr(Hooks, hook.removeprefix("marl_"))
    assert parameters(front) == parameters(getattr(MarlSpecs, hook))
