"""The guides of docs/ are held to the code: tables of sizes, metrics, messages that are quoted, links."""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from marl_core import RunConfig
from marl_core.config.section import Section
from marl_core.registry.families import FAMILIES
from marl_core.registry.model_keys import models_in
from marl_core.report.metric_notes import NOTES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GUIDES = ("first-hour.md", "metrics.md", "run-folder.md", "trouble.md", "after-training.md", "sizes.md")


def text_of(page: str) -> str:
    """A page of docs/."""
    return (DOCS / page).read_text(encoding="utf-8")


def test_the_sizes_are_the_estimates(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_sizes_page", DOCS / "make_sizes_page.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.tables(tmp_path) in text_of("sizes.md"), "run python docs/make_sizes_page.py"


def test_a_card_gets_the_most_exact_base_that_fits() -> None:
    script: Any = runpy.run_path(str(DOCS / "make_sizes_page.py"))
    peaks = {("7B", held): (size * 1e9, 0.0) for held, size in (("bfloat16", 20), ("8 bits", 10), ("4 bits", 5))}
    cells = [script["cell"]("7B", card, peaks) for card in (48, 24, 12, 8, 4)]
    assert cells == ["**bfloat16**", "bfloat16?, **8 bits**", "8 bits?, **4 bits**", "4 bits?", "–"]


def test_every_metric_has_its_heading_and_a_formula() -> None:
    headings = re.findall(r"^### `(.+)`$", text_of("metrics.md"), flags=re.MULTILINE)
    assert sorted(headings) == sorted(note.name for note in NOTES)
    formulas: Any = runpy.run_path(str(DOCS / "make_metrics_page.py"))["FORMULAS"]
    assert set(formulas) == set(headings)


def sentences() -> Iterator[str]:
    """Every text of marl's code; what an f-string fills in is `…`."""
    for file in [*(ROOT / "marl_core").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [one.value if isinstance(one, ast.Constant) else "…" for one in node.values]
                yield "".join(str(part) for part in parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_messages_that_are_quoted_are_the_codes() -> None:
    quoted = re.findall(r"^> (.+)$", text_of("trouble.md"), flags=re.MULTILINE)
    assert len(quoted) > 10
    said = set(sentences())
    lost = [quote for quote in quoted if not any(quote in sentence for sentence in said)]
    assert not lost, "docs/trouble.md quotes what marl doesn't say"


def keys_of(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Every key of the config, dotted, with the sections' own."""
    for name, field in model.model_fields.items():
        key = f"{path}{field.alias or name}"
        yield key
        for inner in models_in(field.annotation):
            if issubclass(inner, Section):
                yield from keys_of(inner, f"{key}.")


def test_the_keys_that_guides_name_exist() -> None:
    """A key in code quotes, `ppo.kl.coef` or `ppo.max_kl: 0.1`, is one of the config; of a strategy its family is enough."""
    sections = set(RunConfig.model_fields)
    known = set(keys_of(RunConfig))
    families = {key.path for family in FAMILIES.values() for key in family.keys}
    for page in GUIDES:
        for key in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?::[^`]*)?`", text_of(page)):
            if key.split(".")[0] not in sections or re.search(r"\.(yaml|md|py|json|jsonl)$", key):
                continue
            open_ended = any(key.startswith(f"{family}.") for family in families)
            assert open_ended or key in known, f"docs/{page}: {key}"


@pytest.mark.parametrize("file", ["README.md", "SECURITY.md", *(f"docs/{page.name}" for page in DOCS.glob("*.md"))])
def test_links_lead_somewhere(file: str) -> None:
    """Relative links to files that are there, anchors to headings that are there, as GitHub names them."""
    page = ROOT / file
    for target in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    ):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{file}: {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there.read_text(encoding="utf-8")), f"{file}: {target}"


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_issue_templates_are_forms() -> None:
    """What GitHub asks of a form: a name, a description, and fields with names of their own. No address of ours is in it."""
    for file in ("bug.yml", "feature.yml"):
        text = (ROOT / ".github/ISSUE_TEMPLATE" / file).read_text(encoding="utf-8")
        form = yaml.safe_load(text)
        assert form["name"]
        assert form["description"]
        names = [field["id"] for field in form["body"] if field["type"] != "markdown"]
        assert len(set(names)) == len(names)
        assert "http" not in text


def test_third_party_plugins_are_told_every_group() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    page = text_of("third-party-plugins.md")
    assert all(f"`{group}`" in page for group in groups)
