"""Commands of installed packages: added, and never a reason why marl itself doesn't work."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.main import get_command

from marl_core import PluginError
from marl_core.cli_commands import GROUP, add_commands


def point(name: str, value: str, package: str = "a") -> EntryPoint:
    made = EntryPoint(name, value, GROUP)
    vars(made)["dist"] = SimpleNamespace(name=package)
    return made


def made(*points: EntryPoint) -> Any:
    app = typer.Typer()

    @app.command()
    def run() -> None:
        """Ours."""

    @app.command()
    def check() -> None:
        """Ours too."""

    add_commands(app, points)
    return get_command(app)


def test_a_function_becomes_a_command() -> None:
    command = made(point("say", "os:getcwd")).commands["say"]
    assert command.callback() is not None


@pytest.mark.parametrize(
    ("points", "text"),
    [
        ([point("say", "no.such.module:f")], "the command of a can't be loaded: ModuleNotFoundError"),
        ([point("say", "sys:maxsize")], "is a int, neither a function nor a typer app"),
        ([point("say", "os:getcwd", "a"), point("say", "os:getpid", "b")], "offered by a and by b"),
    ],
)
def test_one_that_can_not_be_used_says_why_when_it_is_called(points: list[EntryPoint], text: str) -> None:
    command = made(*points).commands["say"]
    with pytest.raises(PluginError, match=text):
        command.callback()


def test_ours_stay_ours() -> None:
    command = made(point("run", "os:getcwd")).commands["run"]
    assert command.callback() is None
    assert command.help == "Ours."
