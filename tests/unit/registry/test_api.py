"""The promises of docs/api.md: versions are compared, and what is to go still works and says what to use instead."""

from __future__ import annotations

import warnings
from typing import ClassVar

import pytest
from pydantic import Field, ValidationError

import marl_core
from marl_core import MarlDeprecationWarning, PluginError, RunConfig, RunResult, Strategy, hookimpl
from marl_core.config.section import Section
from marl_core.config.speed_config import SpeedSection
from marl_core.registry import strategy as strategy_module
from marl_core.registry.catalog import Listing, LoadedStrategy, verify
from marl_core.registry.deprecation import gone_in, warn_deprecated
from marl_core.registry.hooks import Hooks
from marl_core.registry.hookspecs import MarlSpecs


class Old(Strategy):
    """Made for the first version."""

    api: ClassVar[int] = 1


class New(Strategy):
    """Made for the second."""

    api: ClassVar[int] = 2


def test_a_later_one_is_refused() -> None:
    with pytest.raises(
        PluginError, match="observer x: it was made for api 2, this marl-core offers 1: upgrade marl-core"
    ):
        verify(New, "observer", "observer x")
    assert verify(Old, "observer", "observer x") is Old


def test_an_earlier_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy_module, "API", 2)
    with pytest.raises(PluginError, match=r"made for api 1, this marl-core offers 2 .*ask for a newer version of it"):
        verify(Old, "observer", "observer x")
    assert verify(New, "observer", "observer x") is New


def test_one_that_says_nothing_is_of_now() -> None:
    assert Strategy.api == marl_core.API == 1


def test_it_lasts_one_minor_version() -> None:
    assert gone_in("0.2") == "0.3"
    assert gone_in("1.9.4") == "1.10"


def test_what_is_on_its_way_out_says_what_to_use_instead() -> None:
    with pytest.warns(
        MarlDeprecationWarning, match=r"Rollout\.old is deprecated since 0\.2 and gone in 0\.3: use Rollout\.new"
    ) as said:
        warn_deprecated("Rollout.old", "Rollout.new", "0.2")
    assert said[0].filename == __file__


def test_a_deprecated_option_still_works() -> None:
    class Renamed(Strategy):
        """An observer with an option on its way out."""

        size: int = Field(1, description="Size.", deprecated="since 0.2 and gone in 0.3: use length")
        length: int = Field(1, description="Length.")

    loaded = LoadedStrategy(Listing("observer", "renamed", "m:Renamed", "acme", "1.0"), Renamed)
    with pytest.warns(
        MarlDeprecationWarning, match=r"observer renamed: option size is deprecated since 0\.2 .*use length"
    ):
        loaded.build({"size": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.build({"length": 2})


def test_a_deprecated_config_key_still_works() -> None:
    class SamplingSection(Section):
        """A section with a key on its way out."""

        heat: float = Field(1.0, deprecated="since 0.2 and gone in 0.3: use temperature")
        """Temperature."""

    with pytest.warns(MarlDeprecationWarning, match=r"sampling\.heat is deprecated since 0\.2"):
        SamplingSection(heat=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SamplingSection()


class TestARenamedConfigKey:
    """`speed.fold` is called `speed.merge_for_sampling` now: the old one is read, and warns."""

    def test_it_is_still_read_and_written_by_its_new_name(self) -> None:
        with pytest.warns(MarlDeprecationWarning, match=r"speed\.fold is deprecated .*use speed\.merge_for_sampling"):
            speed = SpeedSection.model_validate({"fold": True})
        assert speed.merge_for_sampling
        assert "fold" not in speed.model_dump()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert SpeedSection(merge_for_sampling=True) == speed

    def test_it_is_still_there_to_be_asked(self) -> None:
        with pytest.warns(MarlDeprecationWarning, match=r"speed\.fold is deprecated"):
            assert getattr(SpeedSection(merge_for_sampling=True), "fold")  # noqa: B009  # to a type checker it is gone
        with pytest.raises(AttributeError, match="nothing_of_the_kind"):
            getattr(SpeedSection(), "nothing_of_the_kind")  # noqa: B009

    def test_both_at_once_are_refused(self) -> None:
        with pytest.raises(ValidationError, match="fold is the old name of merge_for_sampling, and both are given"):
            SpeedSection.model_validate({"fold": True, "merge_for_sampling": False})

    def test_where_it_moved(self) -> None:
        found = RunConfig.model_validate({"model": {"path": "m"}, "reference": "r", "reward": "w"}).old_keys()
        assert found == {"speed.fold": "speed.merge_for_sampling"}


def test_a_deprecated_hook_still_works(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Watcher(Strategy):
        """An observer with a hook on its way out."""

        @hookimpl
        def marl_run_end(self, result: RunResult) -> None:
            print("told")

    spec = MarlSpecs.marl_run_end.marl_spec  # type: ignore[attr-defined]  # pluggy's mark
    monkeypatch.setitem(spec, "warn_on_impl", MarlDeprecationWarning("marl_run_end is deprecated since 0.2"))
    with pytest.warns(MarlDeprecationWarning, match="marl_run_end is deprecated"):
        hooks = Hooks([(Watcher(), "watcher")])
    hooks.run_end(RunResult(None, 1, None))
    assert capsys.readouterr().out == "told\n"
