"""Plan: strategies built, findings collected, quantization lazily."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from marl_core import Catalog, ConfigError, DataError, Quantization
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
    assert len(plan.hooks.strategies) == 6


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


def test_findings_that_are_all_about_files_are_a_data_error(
    written: dict[str, Any], catalog: Catalog, tmp_path: Path
) -> None:
    files_only = {**written, "data": {"prompts": str(tmp_path / "no.jsonl")}}
    with pytest.raises(DataError, match=r"there is no file"):
        plan_of(files_only, catalog).require()
    with pytest.raises(ConfigError, match=r"(?s)bias.*no\.jsonl|no\.jsonl.*bias"):
        plan_of({**files_only, "policy": {"lora": {"bias": "all"}}}, catalog).require()
