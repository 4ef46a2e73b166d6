"""YAML: numbers as people write them, words left alone, nothing dangerous, and the way back."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from marl_core import ConfigError
from marl_core.config.yaml_text import dump_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-3", -3),
        ("0", 0),
        ("010", "010"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("{on: policy}", {"on": "policy"}),
        ("\ufeffa: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("'1e-4'", "1e-4"),
    ],
)
def test_values(text: str, value: Any) -> None:
    found = parse_yaml(text, "f")
    assert found == value
    assert type(found) is type(value)


def test_nan_and_infinity_are_numbers_for_the_config_to_refuse() -> None:
    assert math.isnan(parse_yaml(".nan", "f"))
    assert parse_yaml("-.inf", "f") == -math.inf
    assert parse_yaml("1e400", "f") == math.inf


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{name}: &{name} [{','.join([f'*{previous}'] * 9)}]" for previous, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "line 2, column 1: the key 'a' is given twice"),
        ("{a: {b: 1, b: 2}}", "the key 'b' is given twice"),
        ("1: a", "the key 1 is not text"),
        ("? [a]\n: b", "is not text"),
        ("a: [", "line 1"),
        ("a:\n\t- b", "line 2"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: !!int x", "not a valid config"),
        ("a: " + "9" * 5000, "not a valid config"),
        ("[" * 100 + "]" * 100, "levels deep"),
        ("[" * 20000, "nested too deeply"),
        ("a: &a [*a]", "anchor inside itself"),
        (BOMB, "anchors expand to more than"),
        ("a: b: c", "not a valid config"),
        ("a: \x00", "not a valid config"),
        ("--- a\n--- b", "not a valid config"),
    ],
)
def test_refusals_name_the_file(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_yaml(text, "run.yaml")
    assert str(caught.value).startswith("run.yaml: ")


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]))
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text("abcon01-e", min_size=1), inner), max_leaves=8
)


@given(VALUES)
def test_dump_and_parse_are_inverse(value: Any) -> None:
    assert parse_yaml(dump_yaml(value), "f") == value


def test_what_is_dumped_means_the_same_to_readers_of_yaml_1_1() -> None:
    value = {"on": "yes", "folder": "2024-01-01", "x": "1_000", "y": "010", "rate": 1e-5, "n": None, "b": True}
    assert yaml.safe_load(dump_yaml(value)) == value


@given(st.text())
def test_any_text_parses_or_is_refused(text: str) -> None:
    with suppress(ConfigError):
        parse_yaml(text, "f")
