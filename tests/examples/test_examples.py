"""Each example runs as its README says, for two steps on a tiny model, and prints what its expected.txt shows but for numbers.

`make examples` runs this. expected.txt is what the commands printed with the real model.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from marl_core.cli.app import main

pytestmark = pytest.mark.examples

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDERS = sorted(file.parent.name for file in EXAMPLES.glob("*/expected.txt"))
MODEL = "$(python examples/model.py)"
SMALL = {  # what makes a command of the README small
    "marl": ["--set", "ppo.steps=2", "--set", "eval.limit=4", "--set", "run.device=cpu"],
    "loop.py": ["--steps", "2"],
    "two_policies.py": ["ppo.steps=2", "run.device=cpu"],
    "make_rewards.py": ["--steps", "2", "--pairs", "4", "--model", MODEL],
}


def commands(folder: str) -> list[str]:
    """The lines of all `sh` blocks of an example's README."""
    page = (EXAMPLES / folder / "README.md").read_text(encoding="utf-8")
    return [line for block in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines()]


def transcript(folder: str) -> dict[str, str]:
    """Commands of expected.txt and what each printed."""
    text = (EXAMPLES / folder / "expected.txt").read_text(encoding="utf-8")
    parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)
    assert not parts[0]
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def skeleton(output: str) -> list[str]:
    """What kinds of lines follow each other: their first words, without numbers, paths and sampled texts."""
    output = re.sub(r"^ +sample \(.*?(?=^ *\d+ +-?\d+\.\d|^held out|\Z)", "", output, flags=re.MULTILINE | re.DOTALL)
    kinds: list[str] = []
    for line in output.splitlines():
        if line.strip() and not line.startswith(" " * 10):  # a cell of the table above, wrapped
            kind = re.split(r"\s{2,}|: |[\d(/━]", line.strip())[0].strip(" +-") or "a step"
            kinds += [kind] if kinds[-1:] != [kind] else []
    return kinds


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wide_folder: str, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[[str], str]]:
    """Runs one command of a README, made small, in a folder that holds `examples`; gives what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    (tmp_path / "examples").symlink_to(EXAMPLES)
    before = set(sys.modules)

    def one(command: str) -> str:
        program, *words = [
            word.replace(MODEL, wide_folder) for word in shlex.split(command.replace(MODEL, f"'{MODEL}'"))
        ]
        words = [word.replace(MODEL, wide_folder) for word in words]
        small = [word.replace(MODEL, wide_folder) for word in SMALL.get(program, SMALL.get(Path(words[0]).name, []))]
        capfd.readouterr()
        if program == "marl":
            assert main([*words, *small]) == 0, command
        elif program == "pip":
            put_on_path(Path(words[-1]), tmp_path / "site", monkeypatch)
        elif words[0].endswith("make_rewards.py"):  # TRL speaks, and sets what it likes: in a process of its own
            environment = {**os.environ, "MARL_CACHE": str(write_reviews(tmp_path / "cache"))}
            subprocess.run([sys.executable, *words, *small], env=environment, check=True)
        else:
            assert program == "python", f"nobody runs this: {command}"
            monkeypatch.setattr(sys, "argv", [*words, *small])
            runpy.run_path(words[0], run_name="__main__")
        return capfd.readouterr().out

    yield one
    for name in set(sys.modules) - before:
        if name.startswith(("acme_", "examples")):
            del sys.modules[name]


def put_on_path(package: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `pip install -e` does: metadata into a folder on the path, code from where it lies."""
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8"
    )
    lines = []
    for group, members in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in members.items())]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.syspath_prepend(str(package.resolve()))


def write_reviews(cache: Path) -> Path:
    """A cache as the quickstart's download leaves it, with reviews made up here."""
    (pin,) = re.findall(
        r'TEXT = Package\(\s*"[^"]+",\s*"(\w{8})', (EXAMPLES / "quickstart/fetch.py").read_text(encoding="utf-8")
    )
    cache.mkdir()
    lines = [f"{i}\t{3.0 if i % 2 else -3.0}\tfilm {i} is {'good' if i % 2 else 'bad'}" for i in range(120)]
    (cache / f"movie-reviews-{pin}.tsv").write_text("\n".join(lines), encoding="utf-8")
    return cache


@pytest.mark.parametrize("folder", FOLDERS)
def test_it_runs_and_prints_what_is_expected(folder: str, run: Callable[[str], str]) -> None:
    expected = transcript(folder)
    for command in commands(folder):
        printed = run(command)
        if not command.startswith("pip"):
            assert skeleton(printed) == skeleton(expected.pop(command)), command
    assert not expected, "expected.txt shows commands that the README doesn't"
    for steps in Path("runs").rglob("steps.jsonl"):
        assert [json.loads(line)["step"] for line in steps.read_text(encoding="utf-8").splitlines()] == [1, 2]


def test_the_comparison_can_fail() -> None:
    one = "base   m, bfloat16\npre-flight  ok    a\n     1    0.2\n         sample (1.0): x\nyz 3\n     2    0.3\nheld out: reward 1"
    assert skeleton(one) == ["base", "pre-flight", "a step", "held out"]
    assert skeleton(one) == skeleton(one.replace("0.2", "-1.7").replace(" m,", " /a/b,"))
    assert skeleton(one) != skeleton(one.replace("pre-flight  ok    a\n", ""))
    assert skeleton(one) != skeleton(one.replace("held out", "Traceback"))


def test_three_rewards_differ_in_four_lines() -> None:
    folder = EXAMPLES / "three_rewards"
    texts = {name: (folder / f"{name}.yaml").read_text(encoding="utf-8") for name in ("function", "adapter", "model")}
    shown = re.findall(r"```diff\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    for (one, other), block in zip((("function", "adapter"), ("adapter", "model")), shown, strict=True):
        lines = difflib.unified_diff(texts[one].splitlines(), texts[other].splitlines(), lineterm="", n=0)
        changed = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
        assert len(changed) == 4
        assert block.splitlines() == changed


def test_the_sums_are_what_the_script_writes() -> None:
    script: Any = runpy.run_path(str(EXAMPLES / "arithmetic/make_prompts.py"))
    trained, tested = script["rows"]()
    assert (EXAMPLES / "arithmetic/prompts.jsonl").read_text(encoding="utf-8").splitlines() == trained
    assert (EXAMPLES / "arithmetic/heldout.jsonl").read_text(encoding="utf-8").splitlines() == tested
    assert not set(trained) & set(tested)


def test_the_check_of_sums() -> None:
    correct: Any = runpy.run_path(str(EXAMPLES / "arithmetic/checks.py"))["correct"]
    assert correct([""] * 5, [" 9\n", "9", "90", "9\n3+4=7", "nine"], [9, 9, 9, 9, 9]) == [1.0, 1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "folder", sorted({file.parent.name for kind in ("py", "yaml") for file in EXAMPLES.glob(f"*/*.{kind}")})
)
def test_every_example_is_in_the_table_and_has_its_page(folder: str) -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert f"]({folder}/README.md)" in table
    page = (EXAMPLES / folder / "README.md").read_text(encoding="utf-8")
    what_came_out = (
        "(expected.txt)",
        "(result.md)",
        "docs/reference-policies.md)",
        "docs/adapter-study.md)",
        "(short_words.ipynb)",
    )
    assert any(one in page for one in what_came_out)


def test_the_figures_of_the_pages_were_printed() -> None:
    """Each `reward A -> B` in a README stands in an expected.txt."""
    printed = "".join(file.read_text(encoding="utf-8") for file in EXAMPLES.glob("*/expected.txt"))
    for page in [EXAMPLES / "README.md", *EXAMPLES.glob("*/README.md")]:
        for figures in re.findall(r"-?\d+\.\d+ -> -?\d+\.\d+", page.read_text(encoding="utf-8")):
            assert figures in printed, f"{page}: {figures}"
