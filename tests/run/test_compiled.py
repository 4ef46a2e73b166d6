"""speed.compile: the same numbers to rounding, and the same promises, with the decoder layers compiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from marl_core import RunConfig, Runner
from marl_core.bank import trunk
from marl_core.bank.speed import compiled
from marl_core.bank.trunk import PassOptions
from marl_core.errors import ConfigError
from marl_core.ppo.types import UpdateStats
from marl_core.testing import tiny_bank

MakeConfig = Callable[..., RunConfig]
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # torch asks for it itself
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++")), reason="no C++ compiler: torch can't compile for a CPU"
)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What was compiled for one model is kept beside the code that all share."""
    yield
    torch._dynamo.reset()


def first_update(config: RunConfig) -> tuple[Runner, UpdateStats, Tensor]:
    """One step's update, and the old log-probs it began with."""
    runner = Runner(config)
    assert runner.data is not None
    scored = runner.score(runner.generate(runner.data.batch(0, runner.config.ppo.batch, 0)))
    return runner, runner.update(scored), scored.logprobs


@needs_compiler
@pytest.mark.parametrize("changes", [{}, {"model": {"gradient_checkpointing": True}}], ids=["plain", "checkpointing"])
def test_an_update_is_the_plain_one_to_rounding(make_config: MakeConfig, changes: dict[str, Any]) -> None:
    plain = first_update(make_config(speed={"capture": False}, **changes))
    fast = first_update(make_config(speed={"capture": False, "compile": True}, **changes))
    assert fast[0].built.options.compiled
    torch.testing.assert_close(fast[2], plain[2], rtol=0, atol=2e-5)
    assert fast[1].policy_grad_norm == pytest.approx(plain[1].policy_grad_norm, rel=1e-4)
    assert fast[1].policy_loss == pytest.approx(plain[1].policy_loss, abs=1e-5)
    assert fast[1].first_ratio_error == 0.0


@needs_compiler
@pytest.mark.skipif(compiled._release() < compiled.FIRST_TORCH_THAT_ROUNDS_ALIKE, reason="refused with this torch")
def test_the_first_ratio_is_one_in_half_precision(make_config: MakeConfig) -> None:
    """Passes with and without gradient are other code; both round where the plain layers do (I2)."""
    runner, update, _ = first_update(make_config(model={"dtype": "bfloat16"}, speed={"compile": True}))
    assert runner.built.options.compiled
    assert update.first_ratio_error == 0.0


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"model": {"shard": "fsdp2"}}, "model.shard"), ({"quantization": "bnb-4bit"}, "quantization: bnb-4bit")],
)
def test_what_was_never_measured_is_refused(make_config: MakeConfig, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"speed\.compile: compiled layers don't go with {named}"):
        Runner(make_config(speed={"compile": True}, **changes))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_torch_that_rounds_elsewhere_is_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(compiled, "_release", lambda: (2, 12))
    with pytest.raises(ConfigError, match=r"speed\.compile: torch .* doesn't round compiled half precision on a CPU"):
        Runner(make_config(model={"dtype": dtype}, speed={"compile": True}))


def test_a_machine_that_cannot_compile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(layers: object) -> None:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(trunk, "compile_layers", fails)
    bank = tiny_bank()
    with pytest.raises(ConfigError, match=r"No working C\+\+ compiler found It needs a C\+\+ compiler"):
        bank.trunk.prepare(PassOptions(compiled=True))
    assert not bank.trunk.options.compiled


def test_a_base_of_another_build_says_so() -> None:
    bank = tiny_bank()
    bank.trunk.body = torch.nn.Linear(2, 2)
    with pytest.raises(
        ConfigError, match=r"speed\.compile needs a base whose decoder layers are one list; Linear has 0"
    ):
        bank.trunk.prepare(PassOptions(compiled=True))
