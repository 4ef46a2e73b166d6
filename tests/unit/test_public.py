"""The public names: all of them there, fetched when asked for, and the same objects as at home."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import marl_core


def test_every_public_name_can_be_had() -> None:
    for name in marl_core.__all__:
        assert getattr(marl_core, name) is not None
    assert dir(marl_core) == marl_core.__all__
    assert sorted(marl_core.__all__) == sorted({"__version__", *marl_core._HOME})


def test_what_mypy_sees_is_what_there_is() -> None:
    tree = ast.parse(Path(marl_core.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == marl_core._HOME


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="it offers ANY_QUANTIZATION, API, Adapter, AdapterBank"):
        marl_core.Rnner  # noqa: B018  # the access is the test
