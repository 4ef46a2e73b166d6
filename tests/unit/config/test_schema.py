"""The JSON Schema agrees with the validation, knows strategies' options, and leaves broken plugins out by name."""

from __future__ import annotations

from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from marl_core import Catalog
from marl_core.config.load import parse_config
from marl_core.config.schema import json_schema
from marl_core.config.yaml_text import parse_yaml

DESIGN: dict[str, Any] = parse_yaml(
    """
model: {path: HuggingFaceTB/SmolLM2-135M-Instruct, dtype: bfloat16}
quantization: none                         # short for {use: none}
policy: {start: new, r: 16, alpha: 32, targets: all-linear}    # or {start: continue, from: path/to/sft-adapter}
reference: {use: merged-base, adapter: path/to/sft-adapter}
reward: {use: adapter, path: path/to/reward-adapter}           # or a list, each with a weight
value: {on: policy}                        # head on the policy's trunk | own (an adapter of its own) | none
data: {prompts: prompts.jsonl, field: prompt, max_prompt_tokens: 64}
sampling: {max_new_tokens: 48, temperature: 1.0}
ppo: {steps: 50, batch: 32, minibatch: 8, epochs: 4, learning_rate: 1.0e-4, advantage: gae,
      kl: {estimator: k1, into: reward, coef: 0.05}, clip: 0.2}
eval: {every: 10, prompts: heldout.jsonl, judges: {vader: {use: function, target: "judges.py:vader"}}}
observers: [console, json-lines]
run: {folder: runs/first, seed: 0, checkpoint_every: 10}
""",
    "the design",
)


@pytest.fixture(scope="module")
def installed() -> Draft202012Validator:
    schema = json_schema(Catalog.installed())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"reference": "disabled-adapter"},
        {
            "reward": [
                {"use": "function", "target": "m:f", "weight": 0.5, "name": "x"},
                {"use": "marl-core/adapter", "path": "p"},
            ]
        },
        {"ppo": {"clip": {"low": 0.1, "high": 0.3}}},
        {"value": "own"},
        {"policy": {"start": "continue", "from": "x"}},
        {"reference": {"use": "peft-adapter", "adapter": "x", "allow_mismatch": True}},
        {"quantization": {"use": "bnb-4bit", "type": "fp4"}},
    ],
)
def test_the_designs_example_is_valid(installed: Draft202012Validator, change: dict[str, Any]) -> None:
    installed.validate({**DESIGN, **change})
    assert parse_config({**DESIGN, **change}, "the design", Catalog.installed()).data


@pytest.mark.parametrize(
    "change",
    [
        {"reference": "merged"},
        {"reference": {"use": "merged-base", "adapter": 3}},
        {"reference": {"use": "merged-base", "adaptr": "x"}},
        {"reference": {"use": "merged-base"}},
        {"reward": {"use": "function", "target": "m:f", "wieght": 1}},
        {"reward": []},
        {"ppo": {"batch": 0}},
        {"ppo": {"batc": 1}},
        {"value": "policies"},
        {"model": {}},
    ],
)
def test_mistakes_are_not(installed: Draft202012Validator, change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        installed.validate({**DESIGN, **change})


def test_broken_strategies_are_left_out_by_name(catalog: Catalog, written: dict[str, Any]) -> None:
    schema = json_schema(catalog)
    assert "broken of broken-marl 0.1" in schema["$comment"]
    Draft202012Validator(schema).validate(written)
    with pytest.raises(ValidationError):
        Draft202012Validator(schema).validate({**written, "reward": "broken"})


def test_every_reference_inside_resolves() -> None:
    schema = json_schema(Catalog.installed())

    def references(value: Any) -> list[str]:
        if isinstance(value, list):
            return [found for inner in value for found in references(inner)]
        if isinstance(value, dict):
            return [*([value["$ref"]] if "$ref" in value else []), *references(list(value.values()))]
        return []

    missing = {found for found in references(schema) if found.removeprefix("#/$defs/") not in schema["$defs"]}
    assert not missing


def test_no_strategies_at_all_still_give_a_schema() -> None:
    Draft202012Validator.check_schema(json_schema(Catalog([])))
