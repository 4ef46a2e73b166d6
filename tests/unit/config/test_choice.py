"""Choice: three spellings of the same wish, and objects."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from marl_core import Catalog, ConfigError, PluginError, RunConfig, Strategy, dump_config, hookimpl
from marl_core.config.choice import RewardChoice
from marl_core.plan.plan import Plan


class Mine(Strategy):
    target: int = 3

    @hookimpl
    def marl_reward(self) -> Any:
        return len


class NotOne(Strategy):
    pass


def test_three_spellings() -> None:
    long = RewardChoice.model_validate({"use": "short", "target": 3, "weight": 2.0})
    assert long == RewardChoice(use="short", options={"target": 3}, weight=2.0)
    assert RewardChoice.model_validate("short") == RewardChoice(use="short")
    assert RewardChoice.model_validate("short") != long
    assert long != "short"


def test_an_object_is_used_as_it_is(written: dict[str, Any], catalog: Catalog) -> None:
    mine = Mine(target=5)
    config = RunConfig.model_validate({**written, "reward": mine})
    plan = Plan.of(config, catalog)
    assert plan.rewards[0][1] is mine
    assert "Mine of " in config.reward[0].origin
    assert config.reward[0].label == "Mine"
    assert "target: 5" in dump_config(config)


def test_an_object_with_options_beside_it_is_refused(written: dict[str, Any], catalog: Catalog) -> None:
    config = RunConfig.model_validate({**written, "reward": {"use": Mine(), "target": 5}})
    with pytest.raises(ConfigError, match=r"reward\.0: options \['target'\] stand beside a Mine object"):
        Plan.of(config, catalog)


def test_an_object_without_the_familys_hook_is_refused(written: dict[str, Any], catalog: Catalog) -> None:
    config = RunConfig.model_validate({**written, "reward": NotOne()})
    with pytest.raises(PluginError, match=r"reward strategy NotOne of .* has no marl_reward hook"):
        Plan.of(config, catalog)


def test_without_a_catalog_names_wait_for_the_plan(written: dict[str, Any], catalog: Catalog) -> None:
    config = RunConfig.model_validate({**written, "reward": [{"use": "shrot"}]})
    with pytest.raises(ConfigError, match=r"reward\.0: no reward strategy is called 'shrot'"):
        Plan.of(config, catalog)
    config = RunConfig.model_validate({**written, "reward": [{"use": "short", "traget": -3}]})
    with pytest.raises(ConfigError, match=r"reward\.0\.traget: unknown key\. Did you mean 'target'\?"):
        Plan.of(config, catalog)


@pytest.mark.parametrize("value", [3, None, [], {"weight": 1.0}, {"use": {}}, {"use": "short", "weight": "1"}])
def test_other_things_are_refused(value: Any) -> None:
    with pytest.raises(ValidationError):
        RewardChoice.model_validate(value)
