"""Plan: strategies built, findings collected, quantization lazily."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from marl_core import Catalog, ConfigError, DataError, Quantization, RunConfig, Runner
from marl_core.config.load import parse_config
from marl_core.plan.plan import Plan


def plan_of(config: dict[str, Any], catalog: Catalog) -> Plan:
    return Plan.of(parse_config(config, "f", catalog), catalog)


def test_everything_the_config_names_is_built(written: dict[str, Any], catalog: Catalog) -> None:
    judges = {"j": {"use": "short", "target": 2}}
    plan = plan_of(
        {**written, "reward": ["short", "short"], "eval": {"prompts": "p", "judges": judges}, "observers": ["quiet"]},
        catalog,
    )
    assert [choice.use for choice, _ in plan.rewards] == ["short", "short"]
    assert plan.rewards[0][1] is not plan.rewards[1][1]
    assert plan.judges["j"][1].model_dump() == {"target": 2, "path": None}
    assert len(plan.observers) == 1
    assert plan.reference_choice is plan.config.reference
    assert plan.hooks.origin(plan.reference) == "bare of fake-marl 1.0 (marl_fakes:Bare)"
    assert len(plan.hooks.strategies) == 8


def test_quantization_is_asked_once(written: dict[str, Any], catalog: Catalog) -> None:
    plan = plan_of(written, catalog)
    assert plan.quantization == Quantization()
    assert plan.quantization is plan.quantization


def test_a_plan_does_not_change(written: dict[str, Any], catalog: Catalog) -> None:
    plan = plan_of(written, catalog)
    with pytest.raises(FrozenInstanceError):
        plan.reference = plan.quantization_strategy  # type: ignore[misc]  # that is the test


def test_a_good_plan_has_no_findings(written: dict[str, Any], catalog: Catalog) -> None:
    plan = plan_of(written, catalog)
    assert plan.check() == []
    assert plan.warnings() == []
    plan.require()


def test_strategies_sentences_come_with_their_origin(written: dict[str, Any], catalog: Catalog) -> None:
    plan = plan_of({**written, "reward": {"use": "short", "target": 666}}, catalog)
    assert plan.check() == ["reward.target: 666 is not a good number (says short of fake-marl 1.0 (marl_fakes:Short))"]
    with pytest.raises(ConfigError, match=r"this run can't work:\n  reward.target: 666"):
        plan.require()


VALUE_GIVEN = (
    "value: only an adapter of its own has alpha, and the value function is on 'policy'; write value: {on: own"
)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"value": "none"},
            "value: none doesn't go with ppo.advantage: gae, which needs a value function; write value: policy",
        ),
        (
            {"value": "own", "ppo": {"advantage": "rloo", "samples_per_prompt": 2}},
            "value: own is never used with ppo.advantage rloo; write value: none",
        ),
        (
            {"value": {"r": 8}},
            "value: only an adapter of its own has r, and the value function is on 'policy' where value.on is not given; write",
        ),
        ({"value": {"on": "policy", "alpha": 8}}, VALUE_GIVEN),
        (
            {"ppo": {"advantage": "rloo"}},
            "ppo: advantage rloo compares responses to one prompt: samples_per_prompt must be 2 or more",
        ),
    ],
)
def test_what_the_estimator_needs_is_there(
    written: dict[str, Any], catalog: Catalog, changes: dict[str, Any], sentence: str
) -> None:
    """Before a weight is read, and for a config of Python's too."""
    for config in (
        parse_config({**written, **changes}, "f", catalog),
        RunConfig.model_validate({**written, **changes}),
    ):
        (found,) = Plan.of(config, catalog).check()
        assert found.startswith(sentence)
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            Runner(config, catalog=catalog)


def test_where_the_value_function_lives_follows_from_the_estimator(written: dict[str, Any], catalog: Catalog) -> None:
    assert plan_of(written, catalog).value_on == "policy"
    assert plan_of({**written, "value": "own"}, catalog).value_on == "own"
    critic_free = {**written, "ppo": {"advantage": "rloo", "samples_per_prompt": 2}}
    assert plan_of(critic_free, catalog).value_on == "none"
    assert plan_of({**critic_free, "value": "none"}, catalog).check() == []


def test_findings_that_are_all_about_files_are_a_data_error(
    written: dict[str, Any], catalog: Catalog, tmp_path: Path
) -> None:
    files_only = {**written, "data": {"prompts": str(tmp_path / "no.jsonl")}}
    with pytest.raises(DataError, match=r"there is no file"):
        plan_of(files_only, catalog).require()
    with pytest.raises(ConfigError, match=r"(?s)bias.*no\.jsonl|no\.jsonl.*bias"):
        plan_of({**files_only, "policy": {"lora": {"bias": "all"}}}, catalog).require()
