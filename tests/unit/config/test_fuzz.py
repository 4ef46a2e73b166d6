"""Random edits of a valid config either validate or give a MarlError with a message, never another exception."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marl_core import Catalog, ConfigError, PluginError, dump_config
from marl_core.config.load import parse_config
from marl_core.config.yaml_text import dump_yaml, parse_yaml
from marl_core.plan.plan import Plan

VALID: dict[str, Any] = {
    "model": {"path": "some/model", "dtype": "float32"},
    "quantization": "none",
    "policy": {"start": "new", "r": 8, "targets": ["q_proj"], "lora": {"use_rslora": True}},
    "reference": {"use": "merged", "adapter": "some/adapter"},
    "reward": [{"use": "short", "target": 3, "weight": 0.5}, "short"],
    "value": {"on": "own", "r": 4},
    "data": {"prompts": "p.jsonl"},
    "sampling": {"max_new_tokens": 4, "stop": ["a"]},
    "ppo": {"steps": 2, "batch": 4, "minibatch": 2, "kl": {"coef": 0.1}, "clip": {"low": 0.1, "high": 0.2}},
    "shaping": {"clip": 3.0},
    "eval": {"prompts": "h.jsonl", "judges": {"j": {"use": "short"}}},
    "observers": ["quiet", {"use": "quiet"}],
    "run": {"folder": "runs/x", "seed": 1},
}
ODD: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, "", "3", 0, -1, 3.5, 1e400, float("nan"), 2**63, [], {}, [1], {"use": "short"}, {"use": 1}, "short",
     "merged", "all", "none", "..", "a\0b", "\ud800", "x" * 300, {"use": "short", "options": {"target": 1}},
     {"a": {"b": []}}, "fake-marl/short",
     "broken", "/", "a/b/c", {"on": "own"}, 5e-324, -0.0, "__base__"]
)  # fmt: skip
VALUES = ODD | st.recursive(st.integers() | st.text(), lambda inner: st.lists(inner, max_size=2))
KEYS = st.sampled_from(
    [
        "r",
        "use",
        "on",
        "path",
        "from",
        "source",
        "clip",
        "kl",
        "target",
        "options",
        "batch",
        "Model",
        "ppo ",
        "weight",
        "",
    ]
)


def places(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [prefix] if prefix else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, inner in items for place in places(inner, (*prefix, key))]


@st.composite
def edited(draw: st.DrawFn) -> dict[str, Any]:
    config = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.sampled_from(places(config)))
        holder: Any = config
        for part in place[:-1]:
            holder = holder[part]
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "remove":
            del holder[place[-1]]
        elif action == "add" and isinstance(holder[place[-1]], dict):
            holder[place[-1]][draw(KEYS)] = copy.deepcopy(draw(ODD))
        else:
            holder[place[-1]] = copy.deepcopy(draw(VALUES))
    return config


def test_the_valid_config_is_valid(catalog: Catalog) -> None:
    assert Plan.of(parse_config(VALID, "f", catalog), catalog).rewards


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(config=edited())
def test_edits_validate_or_are_refused(config: dict[str, Any], catalog: Catalog) -> None:
    try:
        parsed = parse_config(config, "run.yaml", catalog)
        plan = Plan.of(parsed, catalog)
        assert all(plan.check() or ["nothing"])
        plan.warnings()
        plan.describe()
        text = dump_config(parsed)
        assert dump_config(parse_config(parse_yaml(text, "dump"), "dump", catalog)) == text
    except (ConfigError, PluginError) as error:
        message = str(error)
    else:
        message = "none"
    assert message.strip()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(config=edited())
def test_what_is_accepted_as_values_is_accepted_as_text(config: dict[str, Any], catalog: Catalog) -> None:
    try:
        parsed = parse_config(config, "f", catalog)
        text = dump_yaml(config)
        text.encode()
    except (ConfigError, PluginError, UnicodeEncodeError):
        return
    assert dump_config(parse_config(parse_yaml(text, "f"), "f", catalog)) == dump_config(parsed)
