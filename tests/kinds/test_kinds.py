"""The table of kinds is what is measured: every built-in kind's promises, and some rows of docs/kinds.json anew."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from marl_core.artifacts.kind_table import KINDS, known_kind

pytestmark = pytest.mark.filterwarnings("ignore")
MEASURE = Path(__file__).with_name("kinds_measure.py")
RECORD: dict[str, Any] = json.loads((Path(__file__).parents[2] / "docs" / "kinds.json").read_text(encoding="utf-8"))


def test_every_row_was_measured_and_is_exact() -> None:
    measured = runpy.run_path(str(MEASURE))["KINDS"]
    assert list(RECORD) == list(measured)
    for title, found in RECORD.items():
        assert found["policy"] == measured[title], title
        assert found["beside"]["logits"] is found["beside"]["gradients"] is found["file"] is True, title
        assert found["run"] == {"base": True, "resumed": True, "steps": 3}, title
        assert found["packed"] < 1e-5, title
        assert found["fold"] is None or found["fold"] < 1e-4, title


def test_every_kind_that_is_held_has_a_row() -> None:
    """Trainable tokens learn nothing on prompts that don't hold them, and two kinds don't start as the base."""
    named = {found["policy"].get("kind", found["policy"]["use"]) for found in RECORD.values()}
    held = {kind for kind, known in KINDS.items() if not known.refused and known.start != "other"}
    assert held - named == {"trainable_tokens"}


@pytest.mark.parametrize("title", RECORD)
def test_the_table_of_facts_says_what_was_measured(title: str) -> None:
    found = RECORD[title]
    policy = found["policy"]
    options: dict[str, Any] = {**policy.get("options", {}), **policy.get("lora", {})}
    if policy["use"] in ("lora", "dora"):
        options |= {"use_dora": policy["use"] == "dora", "init_lora_weights": policy.get("init", True)}
    if policy["use"] == "miss":
        options["init_weights"] = policy.get("form", True)
    kind = known_kind("lora" if policy["use"] == "dora" else policy.get("kind", policy["use"]), options)
    starts = [value for value in found["start"].values() if isinstance(value, float)]
    assert (max(starts) == 0.0) == (kind.start == "base")
    for name in ("bnb-4bit", "bnb-8bit"):
        tried = name in kind.packed
        assert tried == isinstance(found[name], float)
        if tried:
            assert found[name] > (1 - 1e-6 if name == "bnb-4bit" else 0.998)


@pytest.mark.parametrize("title", ["MiSS, mini", "SHiRA", "VeRA"])
def test_a_row_measured_again(title: str, tmp_path: Path) -> None:
    """Without bitsandbytes, which isn't everywhere."""
    module = runpy.run_path(str(MEASURE))
    world = module["World"](tmp_path)
    found, policy = RECORD[title], RECORD[title]["policy"]
    config = world.peft_config(policy)
    assert module["beside"](config) == found["beside"]
    assert module["file"](config, tmp_path / "file") is True
    assert module["run"](world, policy, tmp_path / "run") == found["run"]
    assert module["packed"](config) < 1e-5
