"""Commands of installed packages: added, and never a reason why marl itself doesn't work."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.main import get_command

from marl_core import DataError, PluginError
from marl_core.cli.guests import GROUP, add_commands


def point(name: str, value: str, package: str = "a") -> EntryPoint:
    made = EntryPoint(name, value, GROUP)
    vars(made)["dist"] = SimpleNamespace(name=package)
    return made


def made(*points: EntryPoint) -> Any:
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    def run() -> None:
        """Ours."""

    @app.command()
    def check() -> None:
        """Ours too."""

    add_commands(app, points)
    return get_command(app)


def opened(command: Any, *arguments: str) -> Any:
    """The context in which the command would run: what calling it does first."""
    return command.make_context(command.name, list(arguments))


def test_a_function_becomes_a_command() -> None:
    context = opened(made(point("say", "os:getcwd")).commands["say"])
    assert context.command.callback() is not None


COUNT = itertools.count()


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A module of a stranger's, by its source; the command is what it calls `f`. A marker tells whether it was imported."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source: str) -> Any:
        name = f"stranger_{next(COUNT)}"
        (tmp_path / f"{name}.py").write_text(f"import sys\nsys.imported_guests = True\n{source}", encoding="utf-8")
        monkeypatch.delattr(sys, "imported_guests", raising=False)
        return made(point("say", f"{name}:f"))

    return write


SAYS = (
    '"""A stranger."""\nimport typer\n'
    'def f(word: str, loud: bool = False) -> None:\n    """Say a word.\n\n    Long."""\n    print(word)\n'
)


def test_it_is_imported_when_it_is_called_and_not_before(
    guest: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    group = guest(SAYS)
    assert group.main(["check"], standalone_mode=False) is None
    with pytest.raises(SystemExit):
        group.main(["--help"])
    assert "Say a word." in capsys.readouterr().out
    assert not hasattr(sys, "imported_guests")
    group.main(["say", "hello", "--loud"], standalone_mode=False)
    assert capsys.readouterr().out == "hello\n"
    assert hasattr(sys, "imported_guests")


@pytest.mark.parametrize("what", ["--help", "-h"])
def test_its_own_help_is_the_real_ones(
    what: str, guest: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    group = guest(SAYS.replace("import typer", "import typer\ndef g(): ..."))
    if what == "--help":
        with pytest.raises(SystemExit):
            group.main(["say", "--help"])
        assert "--loud" in capsys.readouterr().out
    else:  # an option that the real one doesn't have: wrong usage, as with any command
        with pytest.raises(Exception, match="No such option"):
            group.main(["say", "-h"], standalone_mode=False)


def test_an_app_becomes_a_group_with_one_command_too(
    guest: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    group = guest("import typer\nf = typer.Typer()\n@f.command()\ndef one() -> None:\n    print('one')\n")
    group.main(["say", "one"], standalone_mode=False)
    assert capsys.readouterr().out == "one\n"


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
        opened(command)
    assert command.get_short_help_str(), "marl --help lists it all the same"


BREAKS = {
    "sys.exit": "sys.exit(0)",
    "os._exit's cousin": "raise SystemExit('enough')",
    "an error": "1 / 0",
    "no such import": "import nobody_has_this",
    "not Python": "def def",
    "a base exception": "class E(BaseException): ...\nraise E",
    "an empty app": "import typer\nf = typer.Typer()\nf.add_typer(3)",
    "no such name": "g = 1",
}


@pytest.mark.parametrize("name", BREAKS)
def test_one_that_breaks_on_import_takes_no_other_command_with_it(
    name: str, guest: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    group = guest(BREAKS[name])
    assert group.main(["check"], standalone_mode=False) is None
    with pytest.raises(SystemExit):
        group.main(["--help"])
    assert "say" in capsys.readouterr().out
    with pytest.raises(PluginError, match=r"marl say: the command of a can't be loaded: .* Repair or uninstall"):
        group.main(["say"], standalone_mode=False)


def test_ctrl_c_while_it_is_imported_ends_the_call(guest: Callable[[str], Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        opened(guest("raise KeyboardInterrupt").commands["say"])


def test_help_without_a_source_says_whose_it_is() -> None:
    helps = {
        value: made(point("say", value)).commands["say"].get_short_help_str(80) for value in ("sys:exit", "no.a:f")
    }
    assert helps == dict.fromkeys(helps, "From a.")


def test_ours_stay_ours() -> None:
    command = made(point("run", "os:getcwd")).commands["run"]
    assert command.callback() is None
    assert command.help == "Ours."


def test_our_own_guests_are_not_imported_by_other_commands(tmp_path: Path) -> None:
    code = "import sys\nfrom marl_core.cli.app import main\nmain(['plugins', '--family', 'observer'])\n"
    code += "print(sorted(m for m in sys.modules if 'marl_plugins.' in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['marl_plugins.lines', 'marl_plugins.observers']"


ENDS: dict[str, tuple[str, type[BaseException] | None]] = {
    "a fault of theirs": ("1 / 0", PluginError),
    "an error of marl's kind": ("from marl_core import DataError\n    raise DataError('no such file')", DataError),
    "an end with a code": ("import typer\n    raise typer.Exit(3)", None),
    "sys.exit": ("sys.exit(4)", SystemExit),
    "Ctrl-C": ("raise KeyboardInterrupt", KeyboardInterrupt),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_goes_wrong_in_it_is_its_packages(name: str, guest: Callable[[str], Any]) -> None:
    code, error = ENDS[name]
    context = opened(guest(f"def f() -> None:\n    {code}\n").commands["say"])
    if error is None:
        with pytest.raises(Exception, match="3") as raised:
            context.command.invoke(context)
        assert raised.value.exit_code == 3  # type: ignore[attr-defined]  # click's own, whichever typer carries
        return
    with pytest.raises(error) as caught:
        context.command.invoke(context)
    if error is PluginError:
        assert "marl say: the command of a failed: ZeroDivisionError" in str(caught.value)
