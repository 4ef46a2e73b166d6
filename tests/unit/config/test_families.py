"""A family is its record: with one more of them, and what it names, everything that can be asked for by a config follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import Field

from marl_core import Catalog, ConfigError, PluginError, RunConfig, Strategy, dump_config, hookimpl, load_config
from marl_core.cli import new_plugin
from marl_core.cli.app import main
from marl_core.config import load, schema
from marl_core.config.fields import choices_in, with_long_choices
from marl_core.config.run_config import PPOSection
from marl_core.plan.plan import Plan
from marl_core.registry.families import FAMILIES, Family, Key, family_keys
from marl_core.registry.hookspecs import MarlSpecs, hookspec
from marl_core.registry.model_keys import field_named, models_in
from marl_core.testing import check_strategy, contract

ACME = """
from pydantic import Field
from marl_core import Strategy, hookimpl

class Sweet(Strategy):
    "Sweet."
    sugar: int = Field(1, gt=0, description="Spoons.")

    @hookimpl
    def marl_taste(self):
        return "sweet"
"""
TASTE = Family(
    name="taste",
    about="What it tastes of.",
    required_hook="marl_taste",
    contract="check_taste",
    keys=(
        Key("ppo.taste", "What it tastes of.", default="sweet"),
        Key("tastes", "What it tastes of as well.", many="list"),
    ),
)


@pytest.fixture
def taste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[RunConfig]:
    """A record, a hook, a contract; and a package that offers a member. The config made with them."""

    def marl_taste(self: Any) -> str | None:
        """Say what it tastes of."""

    def check_taste(strategy: Strategy, hooks: Any, bank: Any) -> None:
        assert getattr(strategy, "sugar", 0) < 10, "too sweet"

    monkeypatch.setitem(FAMILIES, "taste", TASTE)
    monkeypatch.setattr(MarlSpecs, "marl_taste", hookspec(firstresult=True)(marl_taste), raising=False)
    monkeypatch.setattr(contract, "check_taste", check_taste, raising=False)
    info = tmp_path / "site" / "acme_taste-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-taste\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[marl.taste]\nsweet = acme_taste:Sweet\n", encoding="utf-8")
    (info.parent / "acme_taste.py").write_text(ACME, encoding="utf-8")
    monkeypatch.syspath_prepend(info.parent)

    class PPO(PPOSection, at="ppo"):
        pass

    class Config(RunConfig, at=""):
        ppo: PPO = Field(default_factory=PPO)

    for module in (load, schema):
        monkeypatch.setattr(module, "RunConfig", Config)
    return Config


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def score(completions, **columns):\n    return [0.0 for _ in completions]\n")
    (tmp_path / "run.yaml").write_text(
        "model: {path: owner/model}\nreference: disabled-adapter\nreward: {use: function, target: 'mine.py:score'}\n",
        encoding="utf-8",
    )
    return tmp_path / "run.yaml"


def test_every_key_that_a_record_names_is_in_the_config() -> None:
    for _, key in family_keys():
        model: Any = RunConfig
        for part in key.section.split(".") if key.section else ():
            section = field_named(model, part)
            assert section is not None, key.path
            model = next(models_in(section.annotation))
        field = field_named(model, key.name)
        assert field is not None, key.path
        assert field.description == key.about


def test_a_config_names_its_members(taste: type[RunConfig], file: Path) -> None:
    plan = Plan.of(load_config(file, (), env={}))
    assert type(plan.strategies["ppo", "taste"]).__name__ == "Sweet"
    assert plan.hooks.origin(plan.strategies["ppo", "taste"]) == "sweet of acme-taste 1.0 (acme_taste:Sweet)"
    sugared = load_config(file, ["ppo.taste={use: sweet, sugar: 2}"], env={})
    assert "  taste:\n    use: sweet\n    sugar: 2\n" in dump_config(sugared)


def test_short_forms_follow(taste: type[RunConfig], file: Path) -> None:
    config: Any = load_config(file, ["ppo.taste=sweet", "ppo.taste.sugar=3"], env={})
    assert config.ppo.taste.resolve().sugar == 3
    config = load_config(file, ["tastes=sweet", "tastes.0.sugar=2", "tastes.1=sweet"], env={})
    assert [choice.resolve().sugar for choice in config.tastes] == [2, 1]
    assert [place for place, _ in choices_in(config)][-3:] == [("ppo", "taste"), ("tastes", 0), ("tastes", 1)]
    assert with_long_choices({"ppo": {"taste": "sweet"}, "tastes": ["sweet"]}) == {
        "ppo": {"taste": {"use": "sweet"}},
        "tastes": [{"use": "sweet"}],
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ppo.taste=sweat", "ppo.taste: no taste strategy is called 'sweat'; did you mean 'sweet'?"),
        ("ppo.taste.suger=1", r"ppo.taste.suger: unknown key. Did you mean 'sugar'\?"),
        ("tastes=[{use: sweet, sugar: 0}]", "tastes.0.sugar: should be greater than 0"),
        ("reference=sweet", "'sweet' is a taste strategy"),
    ],
)
def test_mistakes_are_told(taste: type[RunConfig], file: Path, given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(file, [*(["ppo.taste=sweet"] if "suger" in given else []), given], env={})


def test_the_schema_follows(taste: type[RunConfig]) -> None:
    found = json.loads(json.dumps(schema.json_schema(Catalog.installed())))
    config = {"model": {"path": "x"}, "reference": "disabled-adapter", "reward": {"use": "function", "target": "m:f"}}
    validator = Draft202012Validator(found)
    assert not list(
        validator.iter_errors({**config, "ppo": {"taste": {"use": "sweet", "sugar": 2}}, "tastes": "sweet"})
    )
    assert list(validator.iter_errors({**config, "ppo": {"taste": {"use": "sweet", "suger": 2}}}))
    assert list(validator.iter_errors({**config, "tastes": ["sour"]}))
    assert found["$defs"]["TasteChoice"]["description"] == "What it tastes of."


def test_the_contract_is_the_records(taste: type[RunConfig]) -> None:
    kind = Catalog.installed().load("taste", "sweet").strategy_class
    check_strategy("taste", kind())
    with pytest.raises(AssertionError, match="too sweet"):
        check_strategy("taste", kind.model_validate({"sugar": 11}))

    class Plain(Strategy):
        """Of nothing."""

        @hookimpl
        def marl_run_end(self) -> None:
            pass

    with pytest.raises(AssertionError, match="Plain has no marl_taste hook, which family taste needs"):
        check_strategy("taste", Plain())
    with pytest.raises(ConfigError, match=r"check_strategy: 'tast' is none of .*Did you mean 'taste'\?"):
        check_strategy("tast", Plain())


def test_an_object_needs_the_hook(taste: type[RunConfig]) -> None:
    class Plain(Strategy):
        """Of nothing."""

    config = {"model": {"path": "x"}, "reference": "disabled-adapter", "reward": {"use": "function", "target": "m:f"}}
    with pytest.raises(PluginError, match=r"taste strategy \S*Plain of .* has no marl_taste hook"):
        Plan.of(taste.model_validate({**config, "ppo": {"taste": Plain()}}))


def test_a_package_is_written_for_it(
    taste: type[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With templates called by the family's name."""
    monkeypatch.setattr(new_plugin, "TEMPLATES", "")
    monkeypatch.setattr(new_plugin, "files", lambda package: tmp_path)
    for name, text in {
        "pyproject.toml": '[project.entry-points."marl.$family"]\n$name = "$module:$class_name"',
        "README.md": "$use",
        "taste.py": "",
        "test.py": "$setting\n$settings\n",
        "test_taste.py": "",
    }.items():
        (tmp_path / f"{name}.in").write_text(text, encoding="utf-8")
    assert main(["new-plugin", "salty", "--family", "taste", "--out", str(tmp_path / "out")]) == 0
    assert "Then a config may say:\n  ppo: {taste: {use: salty}}" in capsys.readouterr().out
    assert '[project.entry-points."marl.taste"]' in (tmp_path / "out" / "pyproject.toml").read_text(encoding="utf-8")
    written = (tmp_path / "out" / "tests" / "test_marl_salty.py").read_text(encoding="utf-8").splitlines()
    assert written[0] == "ppo.taste={use: salty}"
    assert written[1] == "reference: {use: disabled-adapter}"


def test_it_is_listed(taste: type[RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--family", "taste"]) == 0
    assert "acme-taste" in capsys.readouterr().out
