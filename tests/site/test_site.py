"""The built site: every link and anchor leads somewhere, nothing is fetched from elsewhere, every public name is there.

`make docs` builds the site and runs this. Sphinx checks links while it builds; this looks at what came out.
"""

from __future__ import annotations

import importlib
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import marl_core

pytestmark = pytest.mark.site

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "site"
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "object": "data"}
GENERATED = {"genindex", "search", "index"}


class Page(HTMLParser):
    """One page: its anchors, where its links lead, what it loads."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors, self.links, self.loads = {""}, set[str](), set[str]()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attributes if value is not None}
        self.anchors.update(given[name] for name in ("id", "name") if name in given)
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        if tag in LOADED and LOADED[tag] in given:
            self.loads.add(given[LOADED[tag]])


@pytest.fixture(scope="module")
def pages() -> dict[Path, Page]:
    assert (SITE / "index.html").is_file(), "no site: run make docs"
    return {file: Page(file) for file in SITE.rglob("*.html")}


def dead_ends(pages: dict[Path, Page]) -> list[str]:
    """Links and loads inside the site that lead to no file or no anchor."""
    dead = []
    for file, page in pages.items():
        for link in page.links | page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            missing = target in pages and unquote(parts.fragment) not in pages[target].anchors
            if not target.is_file() or missing:
                dead.append(f"{file.relative_to(SITE)}: {link}")
    return dead


def test_every_link_leads_somewhere(pages: dict[Path, Page]) -> None:
    assert not dead_ends(pages)


def test_a_dead_end_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SITE", tmp_path)
    file, other = tmp_path / "a.html", tmp_path / "b.html"
    file.write_text('<p id="x"><a href="#x"></a><a href="b.html#y"></a><a href="#z"></a><a href="c.html"></a></p>')
    other.write_text('<h1 id="y"></h1><script src="gone.js"></script><a href="https://a.example/#q"></a>')
    assert sorted(dead_ends({file: Page(file), other: Page(other)})) == [
        "a.html: #z",
        "a.html: c.html",
        "b.html: gone.js",
    ]


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Page]) -> None:
    loads = {load for page in pages.values() for load in page.loads if urlsplit(load).netloc}
    assert not loads
    for sheet in SITE.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"@import\s+(url\()?[\"']?(https?:)?//|url\([\"']?(https?:)?//", text), sheet


def test_every_page_is_built_and_in_the_navigation(pages: dict[Path, Page]) -> None:
    sources = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("README.md")]
    built = {file.relative_to(SITE).with_suffix("").as_posix() for file in pages}
    wanted = {page.relative_to(ROOT).with_suffix("").as_posix() for page in sources}
    assert wanted <= built
    linked = {unquote(urlsplit(link).path) for link in pages[SITE / "index.html"].links}
    assert not {f"{name}.html" for name in wanted} - linked - {"README.html"}


def test_every_public_name_has_its_docstring_there(pages: dict[Path, Page]) -> None:
    anchors = pages[SITE / "docs" / "api.html"].anchors
    for module in ("marl_core", "marl_core.testing", "marl_core.ppo"):
        for name in importlib.import_module(module).__all__:
            homes = {f"{module}.{name}", f"{marl_core._HOME.get(name)}.{name}"}
            assert name.startswith("__") or homes & anchors, f"{module}.{name} is not in the reference"
    assert "marl_core.Runner.train" in anchors


def test_docstrings_come_through_as_they_are_written() -> None:
    """No markup of one language shows in the other: backticks, stars, unclosed roles."""
    text = (SITE / "docs" / "api.html").read_text(encoding="utf-8")
    bodies = re.sub(r"<(pre|code|script|style).*?</\1>", "", text, flags=re.DOTALL)
    assert "system-message" not in text
    assert "`" not in re.sub(r"<[^>]+>", "", bodies)
