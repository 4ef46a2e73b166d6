"""Catalog: names, clashes, near matches; made from literals."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from pydantic import Field, ValidationError, field_validator

from marl_core import Catalog, ConfigError, PluginError, Strategy, hookimpl
from marl_core.registry.catalog import Listing, verify


class Brevity(Strategy):
    """Short."""

    target: int = Field(64, gt=0)

    @field_validator("target")
    @classmethod
    def _unlucky(cls, value: int) -> int:
        if value == 13:
            raise KeyError("a bug in the plugin's validator")
        return value

    @hookimpl
    def marl_reward(self) -> Any:
        return lambda rollout: rollout


class Unmarked(Strategy):
    def marl_reward(self) -> Any: ...


class Misspelt(Strategy):
    @hookimpl
    def marl_rewrad(self) -> Any: ...


def listing(name: str, package: str = "acme-marl", version: str = "2.0", target: str = "fake_acme:Brevity") -> Listing:
    return Listing("reward", name, target, package, version)


@pytest.fixture
def acme(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("fake_acme")
    module.Brevity = Brevity  # type: ignore[attr-defined]  # a module made for the test
    module.number = 3  # type: ignore[attr-defined]  # a module made for the test
    monkeypatch.setitem(sys.modules, "fake_acme", module)
    return module


def test_display_and_qualified_name() -> None:
    assert listing("brevity").display_name == "brevity of acme-marl 2.0 (fake_acme:Brevity)"
    assert listing("brevity").qualified_name == "acme-marl/brevity"


def test_listings_are_of_one_family_in_order_and_once() -> None:
    other = Listing("reference", "a", "m:A", "p", "1")
    catalog = Catalog([listing("z"), listing("a"), other, listing("z")])
    assert [found.name for found in catalog.listings("reward")] == ["a", "z"]
    assert catalog.listings("reference") == (other,)


@pytest.mark.parametrize("asked", ["brevty", "Brevity", "brevity "])
def test_unknown_name_gets_a_near_match_and_the_list(asked: str) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'brevity'\? Installed: brevity, model\.") as caught:
        Catalog([listing("brevity"), listing("model")]).lookup("reward", asked)
    assert caught.value.exit_code == 2


def test_a_name_of_another_family_is_said_to_be_one() -> None:
    catalog = Catalog([listing("brevity"), Listing("reference", "bare", "m:A", "p", "1")])
    with pytest.raises(ConfigError, match="'brevity' is a reward strategy"):
        catalog.lookup("reference", "brevity")


def test_a_name_two_packages_offer_is_an_error_naming_both_and_package_slash_name_picks_one() -> None:
    catalog = Catalog([listing("brevity"), listing("brevity", "other_marl", "0.3", "other:Brevity"), listing("fine")])
    with pytest.raises(
        PluginError, match=r"acme-marl 2\.0 .*and by other_marl 0\.3 .*use: acme-marl/brevity"
    ) as caught:
        catalog.lookup("reward", "brevity")
    assert caught.value.exit_code == 3
    assert catalog.lookup("reward", "other-marl/brevity").version == "0.3"
    assert catalog.lookup("reward", "fine").name == "fine"
    with pytest.raises(ConfigError, match="no reward strategy is called 'third/brevity'"):
        catalog.lookup("reward", "third/brevity")


def test_an_empty_catalog_means_marl_core_is_not_installed() -> None:
    with pytest.raises(PluginError, match="isn't installed in this environment"):
        Catalog([]).lookup("reward", "function")


def test_load_is_cached_and_builds(acme: ModuleType) -> None:
    catalog = Catalog([listing("brevity")])
    loaded = catalog.load("reward", "brevity")
    assert loaded is catalog.load("reward", "acme-marl/brevity")
    built = loaded.build({"target": 3})
    assert isinstance(built, Brevity)
    assert built.target == 3


def test_wrong_options_are_pydantics_errors(acme: ModuleType) -> None:
    with pytest.raises(ValidationError) as caught:
        Catalog([listing("brevity")]).load("reward", "brevity").build({"target": "3"})
    assert caught.value.errors()[0]["loc"] == ("target",)


def test_a_bug_in_a_plugins_validator_is_named_as_the_plugins(acme: ModuleType) -> None:
    with pytest.raises(PluginError, match=r"brevity of acme-marl 2\.0 .* failed while reading its options: KeyError"):
        Catalog([listing("brevity")]).load("reward", "brevity").build({"target": 13})


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (3, "is a int, not a subclass"),
        (dict, "is the class dict, not a subclass"),
        (Unmarked, "isn't marked. Put @hookimpl"),
        (Misspelt, "has no marl_reward hook. It has 'marl_rewrad'"),
        (Strategy, "has no marl_reward hook. Every reward strategy needs one"),
    ],
)
def test_verify(found: object, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        verify(found, "reward", "reward strategy x of y 1 (z)")


def test_an_observer_needs_no_particular_hook() -> None:
    assert verify(Unmarked, "observer", "x") is Unmarked


def test_installed_finds_the_built_ins() -> None:
    names = {
        (found.family, found.name)
        for family in ("reference", "reward")
        for found in Catalog.installed().listings(family)
    }
    assert {("reference", "merged-base"), ("reward", "function")} <= names
