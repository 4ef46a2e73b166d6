"""`policy` and `value` are choices of a kind of adapter, with keys of their own beside the kind's options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from marl_core import Adapter, Catalog, ConfigError, MarlDeprecationWarning, Plan, PolicySection, RunConfig, dump_config
from marl_core.config.load import load_config, parse_config
from marl_core.config.run_config import ValueSection
from marl_core.config.yaml_text import parse_yaml
from marl_core.store.config_diff import changed_keys
from marl_plugins import Lora, Oft, Peft

NEEDED: dict[str, Any] = {"model": {"path": "m"}, "reference": "disabled-adapter"}


def parsed(policy: Any = None, value: Any = None) -> RunConfig:
    written = {**NEEDED, "reward": {"use": "function", "target": "r.py:f"}}
    written |= {"policy": policy} if policy is not None else {}
    written |= {"value": value} if value is not None else {}
    return parse_config(written, "run.yaml", Catalog.installed())


def said(policy: Any = None, value: Any = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parsed(policy, value)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize(
    "policy",
    [
        {"use": "oft", "block": 16, "targets": ["q_proj"]},
        PolicySection(use="oft", block=16, targets=["q_proj"]),
        PolicySection(use=Oft(block=16), targets=["q_proj"]),
        {"use": Oft(block=16), "targets": ["q_proj"]},
    ],
)
def test_ways_to_ask_for_a_kind(policy: Any) -> None:
    plan = Plan.of(RunConfig(**NEEDED, policy=policy))
    section, strategy = plan.adapter_strategies["policy"]
    assert isinstance(strategy, Oft)
    assert (strategy.block, section.targets, section.label) == (16, ["q_proj"], "oft")


def test_one_word_or_an_object_is_the_kind() -> None:
    assert parsed("oft").policy.use == "oft"
    assert isinstance(Plan.of(RunConfig(**NEEDED, policy=Oft())).strategies["policy",], Oft)
    assert parsed({"r": 8}).policy.label == "lora"
    assert (parsed(value="own").value.on, parsed(value="own").value.label) == ("own", "lora")
    plan = Plan.of(RunConfig(**NEEDED, value=Oft(block=4)))
    assert plan.value_on == "own"
    assert isinstance(plan.strategies["value",], Oft)


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ({"use": "oftt"}, "policy: no adapter strategy is called 'oftt'; did you mean 'oft'?"),
        ({"use": "oft", "blok": 3}, "policy.blok: unknown key. Did you mean 'block'?"),
        ({"use": "oft", "start_": "new"}, "policy.start_: unknown key. Did you mean 'start'?"),
        ({"use": "oft", "r": 8}, "policy.r: unknown key."),
        ({"rank": 8}, "policy.rank: unknown key. Did you mean 'r'?"),
        ({"use": "oft", "block": "8"}, "policy.block: should be a valid integer, but '8' was given. Write 8."),
        (
            {"use": "peft", "kind": "boff"},
            "policy.kind: peft has no kind 'boff' that was tried here. Did you mean 'boft'?",
        ),
        (
            {"use": "peft", "kind": "lora"},
            "policy.kind: lora has a strategy of its own, which takes PEFT's options too: write `use: lora`",
        ),
        ({"use": "peft", "kind": "lily"}, "Lily's router averages over the whole sequence"),
        (
            {"use": "peft", "kind": "boft", "boft_block": 2},
            "policy.boft_block: peft's config of boft has no option 'boft_block'. Did you mean",
        ),
        ({"use": "peft", "kind": "vblora"}, "policy.kind: VB-LoRA doesn't start as the base, so step-0 KL isn't 0."),
        ({"use": "vblora"}, "policy: no adapter strategy is called 'vblora': VB-LoRA doesn't start as the base"),
        ({"use": "vera"}, "'vera': it is a kind of PEFT's, {use: peft, kind: vera}."),
        ({"use": "lily"}, "policy: no adapter strategy is called 'lily': Lily's router averages"),
        ({"use": "oft", "oft_block_size": 32}, "policy.oft_block_size: unknown key. Did you mean 'block'?"),
        ({"oft_block_size": 32}, "policy.oft_block_size: unknown key. Known here: alpha"),
        ({"use": "oft", "rank": 32}, "policy.rank: unknown key. Known here: block"),
        ({"use": "peft", "kind": "vera", "r": "8"}, "policy.r: should be a valid integer, but '8' was given. Write 8."),
        (
            {"use": "peft", "kind": "vera", "options": {"r": -1}},
            "policy.options.r: should be greater than 0, but -1 was given.",
        ),
        ({"use": "peft", "kind": "hra", "apply_GS": "yes"}, "policy.apply_GS: should be a valid boolean, but 'yes'"),
        ({"use": "peft", "kind": "vera", "d_initial": "x"}, "policy.d_initial: should be a valid number, but 'x'"),
        ({"use": "peft", "kind": "boft", "boft_block_num": -1}, "should be greater than or equal to 0, but -1"),
        (3, "policy: give a strategy's name, or {use: name, option: value}"),
        (
            {"start": "continue", "from": "a", "use": "oft", "block": 8},
            "start: continue takes use, block from the adapter",
        ),
        ({"start": "continue", "from": "a", "r": 8}, "start: continue takes r from the adapter; remove them here"),
    ],
)
def test_what_is_wrong_is_told_where_it_stands(policy: Any, sentence: str) -> None:
    (line,) = said(policy)
    assert sentence in line


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (
            {"use": "peft", "kind": "adalora", "init_r": 12, "target_r": 8},
            "policy.options.target_r: init_r 12, target_r 8: marl doesn't move ranks between layers",
        ),
        (
            {"use": "peft", "kind": "hira", "rank_pattern": {"q_proj": 8}},
            "policy.options.rank_pattern: peft doesn't pass",
        ),
        (
            {"use": "peft", "kind": "gralora", "r": 7},
            "policy.options.r: 7 must be a multiple of gralora_k, which is 2.",
        ),
        ({"use": "peft", "kind": "boft", "boft_block_num": 4}, "boft_block_num: 4 beside boft_block_size 4: give one"),
        ({"use": "peft", "kind": "road", "group_size": 3}, "policy.options.group_size: 3 is odd"),
        ({"init": "mica", "plus": 16}, "policy.plus: 16 is a factor on B's learning rate, and with init: mica B stays"),
        ({"lora": {"init_lora_weights": "mica"}, "plus": 2}, "with lora.init_lora_weights: mica B stays"),
        ({"init": "mica", "dora": True}, "policy.init: peft has no MiCA with DoRA."),
        ({"use": "dora", "init": "mica"}, "policy.init: peft has no MiCA with DoRA."),
        ({"init": "orthogonal", "r": 7}, "policy.r: 7 is odd, and init: orthogonal needs even ranks."),
        (
            {"lora": {"lora_bais": True}},
            "policy.lora.lora_bais: peft's config of lora has no such option. Did you mean 'lora_bias'?",
        ),
    ],
)
def test_options_that_do_not_go_together_are_told_by_the_check(policy: Any, sentence: str) -> None:
    plan = Plan.of(parsed(policy))
    assert any(sentence in str(finding) for finding in plan.hooks.check(plan))


def test_objects_in_python_name_the_option() -> None:
    with pytest.raises(ConfigError, match=r"options\.rr: peft's config of vera has no option 'rr'"):
        Peft(kind="vera", options={"rr": 8})


def test_a_section_in_python_tells_it_at_once() -> None:
    with pytest.raises(ConfigError, match=r"blok: unknown key\. Did you mean 'block'"):
        PolicySection(use="oft", blok=3)
    with pytest.raises(ConfigError, match=r"lora_alpha: unknown key\. Did you mean 'alpha'"):
        ValueSection(on="own", lora_alpha=3)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    for policy in ("oft", {"r": 8, "lora": {"lora_bias": False}}, {"use": "peft", "kind": "hra", "options": {"r": 4}}):
        config = parsed(policy, {"on": "own", "use": "ia3", "targets": ["q_proj"]})
        (tmp_path / "run.yaml").write_text(dump_config(config), encoding="utf-8")
        again = load_config(tmp_path / "run.yaml")
        assert again == config
    assert parse_yaml(dump_config(parsed({"use": "peft", "kind": "hra", "r": 4})), "x")["policy"]["r"] == 4


def test_an_adapter_that_is_continued_names_no_kind() -> None:
    config = parsed({"start": "continue", "from": "sft"})
    assert "use" not in parse_yaml(dump_config(config), "x")["policy"]
    assert ("policy",) not in Plan.of(config).strategies


BESIDE = "revision: null\nsubfolder: null\ntargets: all-linear\ndropout: 0.0\nlora: {}"
OLDER = {
    "new": f"r: 8\nalpha: 16.0\nstart: new\nfrom: null\n{BESIDE}",
    "usual": f"r: 16\nalpha: 32.0\nstart: new\nfrom: null\n{BESIDE}",
    "continue": f"r: 16\nalpha: 32.0\nstart: continue\nfrom: sft\n{BESIDE}",
}


@pytest.mark.parametrize("case", OLDER)
def test_configs_that_older_versions_wrote_out(case: str, tmp_path: Path) -> None:
    """They load, and a resume with what somebody writes today for the same sees no change."""
    older = dict(parse_yaml(OLDER[case], "older"))
    value = {
        "r": 16,
        "alpha": 32.0,
        "targets": "all-linear",
        "dropout": 0.0,
        "lora": {},
        "on": None,
        "learning_rate": None,
    }
    assert Plan.of(parsed(older, value)).value_on == "policy"
    today = {"new": {"r": 8, "alpha": 16}, "usual": {}, "continue": {"start": "continue", "from": "sft"}}[case]
    config = parsed(today)
    text = dump_config(config)
    stored = parse_yaml(text, "today")
    stored["policy"], stored["value"] = older, value
    from marl_core.config.yaml_text import dump_yaml

    (tmp_path / "config.yaml").write_text(dump_yaml(stored), encoding="utf-8")
    Plan.of(config)
    assert changed_keys(tmp_path / "config.yaml", config) == []
    with pytest.raises(ConfigError, match="policy"):
        changed_keys(
            tmp_path / "config.yaml", parsed({"r": 4} if case != "continue" else {"start": "continue", "from": "x"})
        )


def test_options_of_a_lora_are_still_read_where_they_were() -> None:
    config = parsed({"r": 8})
    with pytest.warns(MarlDeprecationWarning, match=r"config\.policy\.r is deprecated"):
        assert config.policy.r == 8  # type: ignore[attr-defined]
    with pytest.warns(MarlDeprecationWarning), pytest.raises(AttributeError):
        _ = parsed("oft").policy.r  # type: ignore[attr-defined]


def test_changes_reach_the_options() -> None:
    config = RunConfig(**NEEDED).with_changes("policy", "oft", "value.on", "own", "value.use", "ia3")
    assert (config.policy.label, config.value.label) == ("oft", "ia3")
    assert config.with_changes("policy.block", 8).policy.options == {"block": 8}
    assert RunConfig(**NEEDED).with_changes("policy.start", "continue", "policy.from", "a").policy.source == "a"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"learned": -1}, "learned"),
        ({"learned": 1.5}, "learned"),
        ({"learned": 1, "held": -1}, "held"),
        ({"learned": 1, "kept": float("nan")}, "kept"),
        ({"learned": 1, "start": "zero"}, "start"),
        ({"learned": 1, "packed": "bnb-4bit"}, "packed"),
        ({"learned": 1, "rates": {"x": 0.0}}, "rates"),
        ({"learned": 1, "rates": {"x": float("inf")}}, "rates"),
    ],
)
def test_facts_that_can_not_be_meant(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"Adapter.{sentence} is"):
        Adapter(config=object, **options)


def test_facts_do_not_change() -> None:
    rates = {"a": 2.0}
    adapter = Adapter(config=object, learned=1, packed={"x"}, rates=rates)  # type: ignore[arg-type]
    rates["b"] = 3.0
    assert dict(adapter.rates) == {"a": 2.0}
    assert adapter.was_tried_on("x")
    assert not adapter.was_tried_on("y")
    assert Lora().marl_adapter({}, {}, "policy").was_tried_on("anything")
    assert not Peft(kind="hra").marl_adapter({}, {}, "policy").was_tried_on("bnb-4bit")
