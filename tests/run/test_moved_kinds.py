"""Kinds that the table refuses, with the table taken away: the pre-flight check finds what is wrong with them on a moved policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from peft import LilyConfig, LoraConfig, PveraConfig

from marl_core import Adapter, NumericError, Runner, Strategy, hookimpl
from marl_core.bank import adapters

MakeConfig = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore:.*:RuntimeWarning:peft")
TARGETS = ["q_proj", "v_proj"]


class Lily(Strategy):
    """Its router averages over the sequence, so a token sees those after it."""

    @hookimpl
    def marl_adapter(self) -> Adapter:
        """A small one."""
        return Adapter(lambda: LilyConfig(r=4, target_modules=TARGETS), learned=1)


class Pvera(Strategy):
    """It draws at random in train mode."""

    @hookimpl
    def marl_adapter(self) -> Adapter:
        """A small one."""
        return Adapter(lambda: PveraConfig(r=8, target_modules=["q_proj", "o_proj"]), learned=1)


class Plain(Strategy):
    """Nothing is wrong with it."""

    @hookimpl
    def marl_adapter(self) -> Adapter:
        """A small one."""
        return Adapter(lambda: LoraConfig(r=4, target_modules=TARGETS), learned=1)


@pytest.fixture(autouse=True)
def without_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "config_refusal", lambda *_, **__: ())


def check(make_config: MakeConfig, kind: Strategy) -> Any:
    runner = Runner(make_config(policy={"use": kind}, ppo={"learning_rate": 1e-3}))
    assert runner.data is not None
    return runner.check_start(runner.data.batch(0, 4, 0))


def test_a_router_over_the_sequence(make_config: MakeConfig) -> None:
    with pytest.raises(NumericError, match="pre-flight"):
        check(make_config, Lily())


def test_weights_drawn_at_random(make_config: MakeConfig) -> None:
    with pytest.raises(NumericError, match="pre-flight"):
        check(make_config, Pvera())


def test_the_check_can_pass(make_config: MakeConfig) -> None:
    found = check(make_config, Plain()).checks
    assert len(found) > 6
    assert all(one.ok for one in found if one.name != "step")
