"""`marl new-plugin`: what it writes is installed by pip as it stands, and passes its own tests at once."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from marl_core.cli.app import main
from marl_core.cli.new_plugin import write_plugin
from marl_core.registry.families import FAMILIES, family_named

ROOT = Path(__file__).parents[2]


def test_the_packages_pass_their_own_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One package of each family, really installed into a folder, tested against the installed modules."""
    monkeypatch.chdir(tmp_path)
    site = tmp_path / "site"
    packages = [f"marl-my-{family}" for family in FAMILIES]
    for family in FAMILIES:
        assert main(["new-plugin", f"my-{family}", "--family", family]) == 0
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    alone = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    subprocess.run([*pip, *alone, *(f"./{package}" for package in packages)], check=True, capture_output=True)
    monkeypatch.syspath_prepend(site)
    before = set(sys.modules)
    for package in packages:  # only what was installed is on the path
        (tmp_path / package / f"{package.replace('-', '_')}.py").unlink()
    code = pytest.main(["-q", "--import-mode=importlib", "-p", "no:cacheprovider", *packages])
    for name in set(sys.modules) - before:
        if "marl_my_" in name:
            del sys.modules[name]
    out = capsys.readouterr().out
    assert code == 0, out
    assert f"{4 * len(FAMILIES)} passed" in out


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written(tmp_path: Path, family: str) -> None:
    files = write_plugin("length-limit", family_named(family), tmp_path / "out")
    names = ["README.md", "marl_length_limit.py", "pyproject.toml", "tests/test_marl_length_limit.py"]
    assert sorted(str(file.relative_to(tmp_path / "out")) for file in files) == sorted(names)
    project = tomllib.loads((tmp_path / "out" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"] == {f"marl.{family}": {"length-limit": "marl_length_limit:LengthLimit"}}
    assert not any("$" in file.read_text(encoding="utf-8") for file in files)
    code = (tmp_path / "out" / "marl_length_limit.py").read_text(encoding="utf-8")
    assert "api: ClassVar[int] = 1" in code
    for file in files:
        assert not re.search(r"\b[Aa] [aeiou]", re.sub(r"(?m)^ *#.*", "", file.read_text(encoding="utf-8"))), file
    assert max(len(line) for line in code.splitlines()) <= 120


def test_what_is_printed_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", "marl-politeness", "--family", "reward", "--out", "here"]) == 0
    said = capsys.readouterr().out
    assert "pip install -e 'here[test]'" in said
    assert "reward: {use: politeness}" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Polite!", "--family", "reward"], "NAME: 'Polite!' can't name a plugin: use small letters"),
        (["core", "--family", "reward"], "and not core or plugins"),
        (["http", "--family", "reward"], "there is a reward strategy 'http' already, of marl-core"),
        (["new", "--family", "reward", "--out", "full"], "full exists and isn't empty"),
    ],
)
def test_what_cannot_be_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine", encoding="utf-8")
    assert main(["new-plugin", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [file.name for file in tmp_path.rglob("*")] == ["full", "mine.txt"]


def test_an_unknown_family_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-plugin", "x", "--family", "value"]) == 2
    assert "quantization" in capsys.readouterr().err
