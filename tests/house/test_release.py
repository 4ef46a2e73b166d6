"""`make release`, on a copy of the checkout: what stands in its way is said, and what it makes can be published."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files of this checkout (also those not committed yet), as the first commit of a repository of their own."""
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            target = tmp_path / "copy" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    folder = tmp_path / "copy"
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def commit(folder: Path) -> None:
    git(folder, "config", "user.name", "a")
    git(folder, "config", "user.email", "a@example.org")
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "-m", "a")


def release(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(folder / ".ci" / "release.py"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, to call what is in it."""
    monkeypatch.setattr("sys.path", list(sys.path))
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert re.search(old, text, re.MULTILINE)
    file.write_text(re.sub(old, new, text, count=1, flags=re.MULTILINE), encoding="utf-8")


def test_what_stands_in_the_way_is_said(copy: Path) -> None:
    (copy / "stray.txt").write_text("x")
    replace(copy / "CHANGELOG.md", r"^## (\S+) .*$", r"## \1 (unreleased)")
    version = re.search(r'^version = "(.*)"', (copy / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version
    git(copy, "tag", f"v{version[1]}")
    done = release(copy)
    assert done.returncode == 1
    for reason in ("the checkout has changes", "is a tag already", "(unreleased)", "is a placeholder"):
        assert reason in done.stderr
    assert not (copy / "dist").exists()


@pytest.mark.parametrize(
    "repository", ["https://example.org/marl", "https://git.example.com/marl", "https://marl.invalid"]
)
def test_placeholders_are_those_of_the_package(repository: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the program takes for no address can't be released as one."""
    release_py = load(monkeypatch)
    assert any("placeholder" in problem for problem in release_py.obstacles("0.0.0", repository))
    assert not any("placeholder" in problem for problem in release_py.obstacles("0.0.0", "https://git.acme.dev/marl"))


def test_no_tag_is_set_before_the_docs_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tag that was pushed can't be taken back; a page that sphinx refuses is found before it."""
    release_py, done = load(monkeypatch), list[str]()

    def docs(newest: str) -> Path:
        done.append(f"docs {newest}")
        raise SystemExit("release: sphinx failed")

    monkeypatch.setattr(release_py, "obstacles", lambda *given: [])
    monkeypatch.setattr(release_py, "build", lambda *given: done.append("build"))
    monkeypatch.setattr(release_py, "versioned_docs", docs)
    monkeypatch.setattr(release_py, "git", lambda *words: done.append(words[0]))
    monkeypatch.setattr("sys.argv", ["release.py"])
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    with pytest.raises(SystemExit, match="sphinx"):
        release_py.main()
    assert done == ["build", f"docs {version}"]


@pytest.mark.slow
def test_a_release_is_built_checked_and_tagged_and_versions_stand_beside_each_other(copy: Path) -> None:
    replace(copy / "pyproject.toml", r'^Repository = ".*"', 'Repository = "https://git.acme.dev/marl"')
    for version in ("0.8.0", "0.9.0"):
        replace(copy / "pyproject.toml", r'^version = ".*"', f'version = "{version}"')
        replace(copy / "CHANGELOG.md", r"^## .*$", f"## {version} (2026-12-01)")
        commit(copy)
        done = release(copy)
        assert done.returncode == 0, done.stdout + done.stderr
    assert git(copy, "tag").split() == ["v0.8.0", "v0.9.0"]
    assert sorted(file.name for file in (copy / "dist").iterdir()) == [
        "marl_core-0.9.0-py3-none-any.whl",
        "marl_core-0.9.0.tar.gz",
    ]
    with zipfile.ZipFile(copy / "dist" / "marl_core-0.9.0-py3-none-any.whl") as wheel:
        metadata = wheel.read("marl_core-0.9.0.dist-info/METADATA").decode()
    assert "Project-URL: Repository, https://git.acme.dev/marl" in metadata
    assert "](https://git.acme.dev/marl/blob/v0.9.0/docs/" in metadata
    assert not re.search(r"\]\((docs|examples)/", metadata), "a link that leads nowhere from an index"
    sites = copy / "build" / "versions"
    assert 'VERSIONS = ["0.9.0", "0.8.0"]' in (sites / "versions.js").read_text(encoding="utf-8")
    for version in ("0.8.0", "0.9.0"):
        page = (sites / version / "docs" / "cli.html").read_text(encoding="utf-8")
        assert "../../versions.js" in page
        assert f"marl {version}" in page
