"""Who asked is answered in his own words: options of `marl` for the command line, calls for Python."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from marl_core.errors import MERGE, OVERRIDE, RESUME, by_command, in_words

OF_THE_COMMAND_LINE = re.compile(r"(?<![\w-])--(resume|override|set|out|adapter|debug)\b|(?<!`)\bmarl (run|merge)\b")
ONLY_FOR_COMMANDS = (
    "marl_core/cli/",
    "marl_core/store/finished.py",
    "marl_core/config/schema.py",
    "marl_core/plan/describe.py",
)
"""What only a command calls, or says of one."""
ROOT = Path(__file__).parents[2]
READ = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("examples/*/README.md"),
    *ROOT.glob("benchmarks/gpu/*.md"),
]
RARE = re.compile(
    r"\b[Mm]end(?:s|ed|ing)?\b|\bbe had\b|\bthat are none\b|\bnone other\b|\bwith a sentence\b|\bsees or hears\b"
    r"|\b(?:has|had|have)n't\b(?! (?:been|ended|answered|begun|held|let|got))"
)
"""Words that a reader may have to look up, and what stood where `download`, `doesn't have` and `error message` stand now."""


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Texts that are no docstrings and stand in no call of `in_words`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "in_words":
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        yield from texts(node)


def test_no_message_of_the_library_names_an_option_of_the_command_line(core: list[Any]) -> None:
    """But by `in_words`, which gives Python's word as well."""
    wrong = [
        f"{source.path}:{line}: {text[:60]!r}"
        for source in core
        if not source.path.startswith((*ONLY_FOR_COMMANDS, "marl_core/errors.py"))
        for line, text in texts(source.tree)
        if OF_THE_COMMAND_LINE.search(text)
    ]
    assert not wrong


@pytest.mark.parametrize("pair", [RESUME, OVERRIDE, MERGE])
def test_both_speak(pair: tuple[str, str]) -> None:
    assert in_words(*pair) == pair[1]
    with by_command():
        assert in_words(*pair) == pair[0]
        with by_command():
            assert in_words(*pair) == pair[0]
        assert in_words(*pair) == pair[0]
    assert in_words(*pair) == pair[1]


@pytest.mark.parametrize("file", sorted(file for file in READ if file.suffix == ".md"), ids=lambda file: file.name)
def test_pages_use_everyday_words(file: Path) -> None:
    assert not RARE.findall(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", ["marl_core", "plugins/marl_plugins"])
def test_messages_use_everyday_words(folder: str) -> None:
    """What is correct English for a person who learned it from books of another century is no help to most."""
    wrong = [
        f"{file}:{number}: {text[:60]!r}"
        for file in sorted((ROOT / folder).rglob("*.py"))
        for number, text in texts(ast.parse(file.read_text(encoding="utf-8")))
        if RARE.search(text)
    ]
    assert not wrong
