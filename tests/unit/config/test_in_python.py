"""Configs made and changed in Python: mistakes are told as those of a file, objects stay what they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, Field, ValidationError, field_validator

from marl_core import ConfigError, MarlDeprecationWarning, PluginError, RunConfig, Strategy
from marl_core.config.foreign_names import FOREIGN_NAMES
from marl_core.config.run_config import DataSection, EvalSection, KLSection, PolicySection, PPOSection, Section
from marl_core.plan.plan import Plan
from marl_core.registry.model_keys import models_in
from marl_plugins.adapter.lora import Lora
from marl_plugins.adapter.oft import Oft
from marl_plugins.reference import DisabledAdapter, PeftAdapter
from marl_plugins.reward import FunctionReward
from marl_plugins.reward_http import HttpReward

NEEDED: dict[str, Any] = {
    "model": {"path": "m"},
    "reference": DisabledAdapter(),
    "reward": FunctionReward(target="m:f"),
}


def untyped(kind: Any) -> Any:
    """For mistakes that a type checker would tell."""
    return kind


PPO, FUNCTION, HTTP, POLICY = map(untyped, (PPOSection, FunctionReward, HttpReward, PolicySection))


def lines(make: Callable[[], object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make()
    assert isinstance(caught.value, ValueError)  # as pydantic's error is, for those who caught that
    assert "pydantic.dev" not in str(caught.value)
    return str(caught.value).splitlines()


def test_mistakes_in_a_config_are_lines_with_near_matches() -> None:
    said = lines(lambda: RunConfig(modl={}, reference="r", ppo={"bach": 3, "kl": {"coef": -1.0}}, value="polcy"))  # type: ignore[call-arg,arg-type]
    assert said[0] == "RunConfig: 5 problems:"
    assert set(said[1:]) == {
        "  model: is required and wasn't given.",
        "  modl: unknown key. Did you mean 'model'?",
        "  ppo.bach: unknown key. Did you mean 'batch'?",
        "  ppo.kl.coef: should be greater than or equal to 0, but -1.0 was given.",
        "  value: should be 'policy', 'own' or 'none', but 'polcy' was given.",
    }


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PPO(bach=3), ["PPOSection: 1 problem:", "  bach: unknown key. Did you mean 'batch'?"]),
        (
            lambda: PPO(kl={"koef": 1.0}),
            ["PPOSection: 1 problem:", "  kl.koef: unknown key. Did you mean 'coef'?"],
        ),
        (
            lambda: PPO(coef=1.0),
            ["PPOSection: 1 problem:", "  coef: unknown key. It belongs in kl."],
        ),
        (
            lambda: PPOSection(batch=3, minibatch=2),
            ["PPOSection: 1 problem:", "  config: minibatch 2 does not divide batch 3 (remainder 1)."],
        ),
        (
            lambda: FUNCTION(tarjet="m:f"),
            [
                "FunctionReward: 2 problems:",
                "  target: is required and wasn't given.",
                "  tarjet: unknown key. Did you mean 'target'?",
            ],
        ),
        (
            lambda: HTTP(url="http://x", timeout="1"),
            None,
        ),
    ],
)
def test_sections_and_strategies_say_the_same(make: Callable[[], object], said: list[str] | None) -> None:
    found = lines(make)
    assert found == said or (said is None and found[0].startswith("HttpReward: "))


def test_pydantics_own_error_is_the_cause_and_its_own_ways_in_raise_it() -> None:
    with pytest.raises(ConfigError) as caught:
        PPO(bach=3)
    assert isinstance(caught.value.__cause__, ValidationError)
    with pytest.raises(ValidationError):
        PPOSection.model_validate({"bach": 3})


def test_a_section_made_inside_of_a_validator_is_one_problem_among_others() -> None:
    class Mine(BaseModel):
        first: int
        second: str

        @field_validator("second")
        @classmethod
        def _made(cls, value: str) -> str:
            PPO(**{value: 3})
            return value

    with pytest.raises(ValidationError) as caught:
        Mine(first="x", second="bach")
    assert [error["loc"] for error in caught.value.errors()] == [("first",), ("second",)]


def test_wrong_options_of_a_named_strategy_are_told_when_the_plan_is_made() -> None:
    config = RunConfig(**{**NEEDED, "reference": {"use": "peft-adapter", "adaptor": "x"}})
    with pytest.raises(ConfigError, match=r"reference.adaptor: unknown key. Did you mean 'adapter'"):
        Plan.of(config)


def test_sections_copy_as_before() -> None:
    section = PPOSection(batch=16)
    for again in (copy.deepcopy(section), section.model_copy()):
        assert again == section
    strategy = FunctionReward(target="m:f")
    assert copy.deepcopy(strategy).target == "m:f"
    assert strategy.fresh().target == "m:f"


# -- with_changes ---------------------------------------------------------------------------------------------


def test_pairs_and_a_mapping_change_the_same() -> None:
    config = RunConfig(**NEEDED)
    one = config.with_changes("ppo.kl.coef", 0.1, "ppo.steps", 20)
    assert one == config.with_changes({"ppo.kl.coef": 0.1, "ppo.steps": 20})
    assert (one.ppo.kl.coef, one.ppo.steps, one.ppo.batch) == (0.1, 20, config.ppo.batch)
    assert (config.ppo.kl.coef, config.ppo.steps) == (0.2, 50)
    assert type(one) is RunConfig


def test_objects_stay_these_objects() -> None:
    reward, judge = FunctionReward(target="m:f"), FunctionReward(target="m:g")
    config = RunConfig(**{**NEEDED, "reward": [{"use": reward, "weight": 0.5}], "eval": {"judges": {"j": judge}}})
    changed = config.with_changes("reward.0.weight", 2.0, "reward.1", reward, "run.folder", None)
    assert [(choice.use, choice.weight) for choice in changed.reward] == [(reward, 2.0), (reward, 1.0)]
    assert changed.eval.judges["j"].use is judge
    assert changed.reference.use is config.reference.use


def test_short_forms_open_as_for_set() -> None:
    config = RunConfig(**{**NEEDED, "reference": "peft-adapter", "value": "policy"})
    changed = config.with_changes(
        {
            "reference.adapter": "sft",
            "value.r": 4,
            "data.prompts": "p.jsonl",
            "ppo.clip.high": 0.3,
            "ppo.advantage": "rloo",
        }
    )
    assert changed.reference.options == {"adapter": "sft"}
    assert (changed.value.on, changed.value.options) == ("policy", {"r": 4})
    assert changed.data == DataSection(prompts="p.jsonl")
    assert (changed.ppo.clip.low, changed.ppo.clip.high, changed.ppo.advantage.use) == (0.2, 0.3, "rloo")


def test_a_mapping_changes_the_keys_it_names_and_a_section_replaces_the_whole() -> None:
    config = RunConfig(**NEEDED, ppo={"batch": 16, "kl": {"coef": 0.4, "target": 6.0}})
    some = config.with_changes("ppo", {"steps": 3, "kl": {"target": 1.0}})
    assert (some.ppo.steps, some.ppo.batch, some.ppo.kl.coef, some.ppo.kl.target) == (3, 16, 0.4, 1.0)
    whole = config.with_changes("ppo", PPOSection(steps=3))
    assert whole.ppo == PPOSection(steps=3)
    strategy = config.with_changes("reference", {"use": "peft-adapter", "adapter": "a"})
    assert strategy.reference.options == {"adapter": "a"}


def test_aliases_and_old_names_are_understood() -> None:
    config = RunConfig(**NEEDED)
    for key in ("policy.from", "policy.source"):
        assert config.with_changes("policy.start", "continue", key, "sft").policy.source == "sft"
    with pytest.warns(MarlDeprecationWarning, match="speed.fold is deprecated") as caught:
        assert config.with_changes("speed.fold", True).speed.merge_for_sampling
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("ppo.kl.koef", 0.1), "  ppo.kl.koef: unknown key. Did you mean 'coef'?"),
        (("pppo.kl", 0.1), "  pppo: unknown key. Did you mean 'ppo'?"),
        (("ppo.batch", 7), "does not divide batch 7"),
        (("ppo.kl.coef",), "an odd number of arguments"),
        ((), "an odd number|nothing to change"),
        ((3, 4), "3 is no key of a config"),
        (("ppo..kl", 4), "'ppo..kl' is no key"),
        (("reward.4.weight", 4), "with_changes.'reward.4.weight', ....: the list has 1 entries"),
        (("model.path.x", 4), "model.path is the value 'm', not a section"),
        (("reference.adapter", "x"), "reference is a DisabledAdapter object, which holds its own options"),
        (({"ppo.steps": 3}, 4), "is no key of a config"),
    ],
)
def test_what_cant_be_changed_is_a_config_error(changes: tuple[Any, ...], said: str) -> None:
    config = RunConfig(**NEEDED)
    if not changes:
        assert config.with_changes({}) == config
        return
    with pytest.raises(ConfigError, match=said):
        config.with_changes(*changes)


def test_deprecated_keys_that_nobody_gave_are_not_warned_of() -> None:
    class Old(EvalSection, at="eval"):
        gone: int = Field(3, deprecated="since 0.1: use every")

    class Config(RunConfig, at=""):
        eval: Old = Field(default_factory=Old)

    assert Config(**NEEDED).with_changes("ppo.steps", 3).ppo.steps == 3  # warnings are errors here


def test_a_plugin_that_isnt_there_is_told_by_the_plan_as_before() -> None:
    changed = RunConfig(**NEEDED).with_changes("reference", "nobody")
    with pytest.raises((ConfigError, PluginError), match="nobody"):
        Plan.of(changed)


def test_a_strategy_of_ones_own_keeps_its_identity_through_two_changes() -> None:
    class Mine(Strategy):
        """Mine."""

        api: ClassVar[int] = 1
        decay: float = 0.5

    mine = Mine(decay=0.9)
    config = RunConfig(**NEEDED).with_changes("observers", [mine]).with_changes("ppo.steps", 2)
    assert config.observers[0].use is mine


def test_the_policy_section_takes_its_source_by_both_names() -> None:
    assert PolicySection(start="continue", source="x") == POLICY(**{"start": "continue", "from": "x"})
    assert isinstance(PeftAdapter(adapter="x"), Strategy)


# -- names, paths and forms that people bring -----------------------------------------------------------------


def every_key(model: type[BaseModel], prefix: str = "") -> set[str]:
    keys = set()
    for name, field in model.model_fields.items():
        keys.add(f"{prefix}{field.alias or name}")
        for inner in models_in(field.annotation):
            if issubclass(inner, Section):
                keys |= every_key(inner, f"{prefix}{field.alias or name}.")
    return keys


def test_each_foreign_name_leads_to_a_key_and_is_none_itself() -> None:
    keys = every_key(RunConfig) | {
        f"{key}.{option}" for key in ("policy", "value") for option in (*Lora.model_fields, *Oft.model_fields)
    }
    assert {name for known in FOREIGN_NAMES.values() for name in known} <= keys
    for name, known in FOREIGN_NAMES.items():
        assert not {f"{ours.rpartition('.')[0]}.{name}" for ours in known} & keys, name


@pytest.mark.parametrize(
    ("where", "key", "ours"),
    [
        ("ppo", "kl_coef", "kl.coef"),
        ("ppo", "kl_koef", "kl.coef"),
        ("ppo", "clip_low", "clip.low"),
        ("ppo", "lr", "learning_rate"),
        ("ppo", "beta", "kl.coef"),
        ("ppo", "mini_batch_size", "minibatch"),
        ("ppo", "max_completion_length", "sampling.max_new_tokens"),
        ("policy", "lora_r", "r"),
        ("value", "lora_alpha", "alpha"),
        ("run", "output_dir", "folder"),
    ],
)
def test_names_of_other_trainers_and_of_inner_sections(where: str, key: str, ours: str) -> None:
    (said,) = lines(lambda: RunConfig(**{**NEEDED, where: {key: 1}}))[1:]
    assert said == f"  {where}.{key}: unknown key. Did you mean {ours!r}?"


def test_a_section_by_itself_and_the_config_itself_know_them_too() -> None:
    assert lines(lambda: PPO(lr=1e-5))[1:] == ["  lr: unknown key. Did you mean 'learning_rate'?"]
    assert lines(lambda: untyped(KLSection)(beta=1.0))[1:] == ["  beta: unknown key. Did you mean 'coef'?"]
    assert lines(lambda: untyped(RunConfig)(**NEEDED, lr=1e-5))[1:] == [
        "  lr: unknown key. Did you mean 'ppo.learning_rate'?"
    ]


class Named:
    """A path object that isn't pathlib's."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __fspath__(self) -> str:
        return self.text


def test_path_objects_are_taken_and_kept_as_texts(tmp_path: Path) -> None:
    written = {
        "model": {"path": tmp_path / "m", "tokenizer": Named("t")},
        "policy": {"start": "continue", "from": Path("a")},
        "reference": {"use": "peft-adapter", "adapter": Path("a")},
        "data": {"prompts": Path("p.jsonl")},
        "eval": {"prompts": Path("e.jsonl")},
        "run": {"folder": Path("runs/x")},
    }
    config = RunConfig(**untyped(written))
    assert (config.model.path, config.model.tokenizer) == (str(tmp_path / "m"), "t")
    assert (config.policy.source, config.run.folder) == ("a", str(Path("runs/x")))
    assert config.data is not None
    assert (config.data.prompts, config.eval.prompts) == ("p.jsonl", "e.jsonl")
    assert config.with_changes("run.folder", Path("y")).run.folder == "y"
    assert PeftAdapter(adapter=untyped(Path("a"))).adapter == "a"
    assert lines(lambda: RunConfig(**untyped({**NEEDED, "run": {"folder": 3}})))[1:] == [
        "  run.folder: should be a valid string, but 3 was given."
    ]


def test_torchs_dtypes_are_taken() -> None:
    torch = pytest.importorskip("torch")
    assert RunConfig(**untyped({**NEEDED, "model": {"path": "m", "dtype": torch.float16}})).model.dtype == "float16"
    with pytest.raises(ConfigError, match="but 'int8' was given"):
        RunConfig(**untyped({**NEEDED, "model": {"path": "m", "dtype": torch.int8}}))


def score(prompts: list[str], completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"reward": (score, 0.5)}, '  reward: give the weight by its name: {"use": score, "weight": 0.5}.'),
        ({"reward": [(score, 0.5)]}, '  reward.0: give the weight by its name: {"use": score, "weight": 0.5}.'),
        ({"eval": {"judges": [score]}}, '  eval.judges: give each a name, for metrics: {"score": score}.'),
        ({"eval": {"judges": score}}, '  eval.judges: give each a name, for metrics: {"score": score}.'),
        (
            {"eval": {"judges": [FunctionReward(target="m:f")]}},
            '  eval.judges: give each a name, for metrics: {"name1": FunctionReward(...)}.',
        ),
        ({"sampling": {"stop": "the"}}, "  sampling.stop: should be a valid list, but 'the' was given. Write [the]."),
        (
            {"data": {"prompts": "p", "chat": "yes"}},
            "  data.chat: should be a valid boolean, but 'yes' was given. Write true.",
        ),
        ({"ppo": {"steps": 1e3}}, "  ppo.steps: should be a valid integer, but 1000.0 was given. Write 1000."),
        (
            {"ppo": {"steps": 1.5}},
            "  ppo.steps: should be a valid integer, but 1.5 was given.",
        ),
    ],
)
def test_forms_that_people_try_are_shown_as_they_are_written(given: dict[str, Any], said: str) -> None:
    assert lines(lambda: RunConfig(**{**NEEDED, **given}))[1:] == [said]


def test_a_pair_of_two_rewards_stays_a_list_of_two() -> None:
    assert len(RunConfig(**{**NEEDED, "reward": (score, score)}).reward) == 2


def test_one_mapping_without_names_is_told_how_to_be_given() -> None:
    (said,) = lines(lambda: untyped(RunConfig)({"model": {"path": "m"}}))
    assert said == "RunConfig: give sections by name: RunConfig(**mapping), or load_config(FILE) for a YAML file."
    assert lines(lambda: PPO({"steps": 3})) == ["PPOSection: give keys by name: PPOSection(**mapping)."]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda config: setattr(config.ppo, "steps", 9),
            r"^ppo.steps: .* config.with_changes\('ppo.steps', 9\) gives a new",
        ),
        (lambda config: setattr(config.ppo.kl, "coef", 0.1), r"config.with_changes\('ppo.kl.coef', 0.1\)"),
        (lambda config: delattr(config.ppo, "steps"), r"a config doesn't change"),
        (lambda config: setattr(config.ppo, "stepps", 9), r"ppo.stepps: there is no such key. Did you mean 'steps'\?"),
        (lambda config: setattr(config.reward[0], "weight", 2.0), r"with KEY as in a file, such as 'reward.0.weight'"),
    ],
)
def test_a_config_that_is_to_change_says_how_to_get_another(change: Callable[[RunConfig], None], said: str) -> None:
    config = RunConfig(**NEEDED)
    with pytest.raises(ConfigError, match=said) as caught:
        change(config)
    assert "pydantic.dev" not in str(caught.value)


def test_a_strategys_state_is_kept_under_a_declared_name_with_an_underscore() -> None:
    class Counting(Strategy):
        """Counts."""

        limit: int = 3
        _seen: int = 0

    counting = Counting()
    counting._seen = 2
    assert counting._seen == 2
    with pytest.raises(ConfigError, match=r"declared in the class: `_calls: int = 0`"):
        untyped(counting).calls = 1
    with pytest.raises(ConfigError, match=r"the option limit can't be changed once it is made"):
        untyped(counting).limit = 4


def test_a_mapping_for_a_section_is_merged_and_an_object_replaces_it() -> None:
    config = RunConfig(**NEEDED, ppo={"batch": 16, "minibatch": 8})
    assert config.with_changes("ppo", {"steps": 3}).ppo.batch == 16
    assert config.with_changes("ppo", PPOSection(steps=3)).ppo.batch == PPOSection().batch
