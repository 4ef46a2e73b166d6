"""Steps and samples are written wherever there is a run folder, whoever else is named to watch; the command line keeps its console."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marl_core import Catalog, Plan, Runner, Strategy, hookimpl
from marl_core.plan.describe import describe_roles
from marl_core.registry.catalog import Listing
from marl_plugins.observers import Console, JsonLines


class Ear(Strategy):
    """Hears of steps and writes nothing."""

    @hookimpl
    def marl_step_end(self) -> None:
        """Nothing."""


class MoreLines(JsonLines):
    """A stranger's kind of json-lines."""


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("observers", [[], [Ear()]])
def test_python_with_a_folder_writes_steps_and_samples(
    make_config: Callable[..., Any], tmp_path: Path, observers: list[Any]
) -> None:
    Runner(make_config(run={"folder": str(tmp_path / "run")}, observers=observers)).train()
    assert [line["step"] for line in lines(tmp_path / "run" / "steps.jsonl")] == [1, 2]
    assert {line["step"] for line in lines(tmp_path / "run" / "samples.jsonl")} == {1, 2}


@pytest.mark.parametrize(
    "named",
    [
        "json-lines",
        {"use": "json-lines", "samples": 1},
        {"use": "marl-core/json-lines", "samples": 1},
        JsonLines(samples=1),
        MoreLines(samples=1),
    ],
)
def test_one_that_is_named_is_the_one(make_config: Callable[..., Any], tmp_path: Path, named: Any) -> None:
    Runner(make_config(run={"folder": str(tmp_path / "run")}, observers=[named], ppo={"steps": 1})).train()
    assert len(lines(tmp_path / "run" / "steps.jsonl")) == 1
    assert len(lines(tmp_path / "run" / "samples.jsonl")) == (4 if named == "json-lines" else 1)


@pytest.mark.parametrize(
    ("folder", "command_line", "watching"),
    [
        (False, False, ["Ear"]),
        (True, False, ["Ear", "json-lines"]),
        (False, True, ["Ear", "console"]),
        (True, True, ["Ear", "console", "json-lines"]),
    ],
)
def test_who_watches(
    make_config: Callable[..., Any], tmp_path: Path, folder: bool, command_line: bool, watching: list[str]
) -> None:
    run = {"folder": str(tmp_path / "run")} if folder else {}
    config = make_config(run=run, observers=[Ear()])
    plan = Plan.of(config, command_line=command_line)
    assert [choice.label for choice in plan.config.observers] == watching
    assert len(plan.observers) == len(watching)
    (row,) = [role for role in describe_roles(plan) if role.name == "observers"]
    assert row.weights == ", ".join(watching)
    assert (str(tmp_path) in row.note) is folder
    assert [choice.label for choice in config.observers] == ["Ear"], "the config that was given stays as it was"


def test_a_named_console_isn_t_doubled(make_config: Callable[..., Any]) -> None:
    plan = Plan.of(make_config(observers=[Console(samples_every=0)]), command_line=True)
    assert [type(observer) for observer in plan.observers] == [Console]


def test_a_plan_s_config_gives_the_same_plan(make_config: Callable[..., Any], tmp_path: Path) -> None:
    """A run folder's config.yaml names them all, and starts the same run again."""
    once = Plan.of(make_config(run={"folder": str(tmp_path / "run")}), command_line=True)
    assert Plan.of(once.config, command_line=True).config == once.config


def test_another_package_s_json_lines_takes_nobody_s_place(make_config: Callable[..., Any], tmp_path: Path) -> None:
    installed = Catalog.installed()
    theirs = Listing("observer", "json-lines", f"{__name__}:Ear", "stranger", "1.0")
    listings = [listing for name in ("reference", "reward", "quantization", "advantage", "observer")
                for listing in installed.listings(name)]  # fmt: skip
    plan = Plan.of(make_config(run={"folder": str(tmp_path / "run")}), Catalog([*listings, theirs]))
    assert [type(observer) for observer in plan.observers] == [JsonLines]


def test_without_the_built_in_package_nothing_is_added(make_config: Callable[..., Any], tmp_path: Path) -> None:
    installed = Catalog.installed()
    listings = [listing for name in ("reference", "reward", "quantization", "advantage")
                for listing in installed.listings(name)]  # fmt: skip
    assert Plan.of(make_config(run={"folder": str(tmp_path / "run")}), Catalog(listings)).observers == ()
