"""Environment and --set over the file."""

from __future__ import annotations

from typing import Any

import pytest

from marl_core import ConfigError, RunConfig
from marl_core.config.overrides import apply_settings, settings_from_environment, settings_from_options

BASE = {"ppo": {"clip": 0.2}, "reward": {"use": "short"}, "reference": "bare", "value": "own", "observers": ["a"]}


@pytest.mark.parametrize(
    ("option", "path", "value"),
    [
        ("ppo.kl.coef=1e-3", ["ppo", "kl", "coef"], 1e-3),
        ("ppo.clip.low=0.1", ["ppo", "clip"], {"low": 0.1, "high": 0.2}),
        ("reward.target=3", ["reward"], {"use": "short", "target": 3}),
        ("reward.0.weight=2", ["reward"], [{"use": "short", "weight": 2}]),
        ("reference.adapter=x=y", ["reference"], {"use": "bare", "adapter": "x=y"}),
        ("value.r=4", ["value"], {"on": "own", "r": 4}),
        ("observers.1=b", ["observers"], ["a", "b"]),
        ("observers.0.path=p", ["observers"], [{"use": "a", "path": "p"}]),
        ("observers=[]", ["observers"], []),
        ("run.folder=", ["run", "folder"], None),
        ("eval.judges.v={use: f}", ["eval", "judges", "v"], {"use": "f"}),
    ],
)
def test_set(option: str, path: list[str], value: Any) -> None:
    found: Any = apply_settings(RunConfig, BASE, settings_from_options([option]))
    for part in path:
        found = found[part]
    assert found == value


def test_the_given_config_stays_as_it_is() -> None:
    apply_settings(RunConfig, BASE, settings_from_options(["ppo.clip=0.3"]))
    assert BASE["ppo"] == {"clip": 0.2}


def test_environment_is_read_by_prefix_and_options_win() -> None:
    env = {"MARL__PPO__KL__COEF": "0.1", "MARL__PPO__BATCH": "4", "HOME": "/x", "MARL_X": "1"}
    found = apply_settings(RunConfig, {}, [*settings_from_environment(env), *settings_from_options(["ppo.batch=8"])])
    assert found == {"ppo": {"kl": {"coef": 0.1}, "batch": 8}}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("ppo.batch", "needs the form section.key=value"),
        ("=3", "an empty key"),
        ("ppo..x=3", "an empty key"),
        ("ppo.batch=[", r"sets\['ppo.batch=\['\]: not a valid config"),
        ("ppo.clip.low.x=3", "ppo.clip.low is the value 0.2, not a section"),
        ("observers.5=a", "the list has 1 entries, so '5' names none"),
        ("observers.x=a", "'x' names none"),
        ("reference.use.x=3", "reference.use is the value 'bare'"),
    ],
)
def test_refusals_name_the_option(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_settings(RunConfig, BASE, settings_from_options([option]))
