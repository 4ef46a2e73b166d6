"""Every invariant I1 to I28 has a test that carries its number, or is named here."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ALL = range(1, 29)
TESTS = Path(__file__).parents[1]


BY_OTHER_NAMES = {
    21: ("run/test_kills.py", "test_five_kills_change_nothing"),
    22: ("run/test_kills.py", "test_asked_to_stop_it_saves_the_step_and_goes_on_from_there"),
    23: ("ranks/test_ranks.py", "test_gradients_are_the_same"),
}
"""Kills, signals and several processes: tests of parts that have files of their own, and come with them."""


def numbered(tests: Path = TESTS) -> dict[int, list[str]]:
    """Tests by the number of their invariant: functions called test_iNN_..."""
    found: dict[int, list[str]] = defaultdict(list)
    for file in sorted(tests.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (number := re.match(r"test_i(\d\d)_", node.name)):
                found[int(number.group(1))].append(f"{file.relative_to(tests)}::{node.name}")
    return found


def test_every_invariant_has_a_test() -> None:
    found = numbered()
    elsewhere = {number: TESTS / file for number, (file, _) in BY_OTHER_NAMES.items()}
    for number, file in elsewhere.items():
        assert (
            found[number]
            or not file.is_file()
            or f"def {BY_OTHER_NAMES[number][1]}(" in file.read_text(encoding="utf-8")
        )
    assert [number for number in ALL if not found[number] and number not in elsewhere] == []
    assert set(found) <= set(ALL)


def test_the_rule_can_fail(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "class TestX:\n    def test_i07_y(self): ...\ndef test_z(): ...\n", encoding="utf-8"
    )
    assert numbered(tmp_path) == {7: ["test_x.py::test_i07_y"]}
