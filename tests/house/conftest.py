"""The source tree, parsed once."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Source:
    """One source file."""

    path: str
    text: str
    tree: ast.Module


@pytest.fixture(scope="session")
def core() -> list[Source]:
    return _sources("marl_core")


@pytest.fixture(scope="session")
def guests() -> list[Source]:
    return _sources("plugins/marl_plugins")


def _sources(folder: str) -> list[Source]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"no sources in {folder}: this test runs from a checkout"
    texts = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}
    return [Source(path, text, ast.parse(text)) for path, text in texts.items()]
