"""The site of the docs from plain files, without a network: its pages are drawn, its search finds, no script complains."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytestmark = pytest.mark.browser

SITE = Path(__file__).parents[2] / "build" / "site"
Look = Callable[..., Any]


@pytest.fixture(autouse=True)
def built() -> None:
    assert (SITE / "index.html").is_file(), "no site: run make docs"


def test_the_search_finds_without_a_server(look: Look) -> None:
    address = f"{(SITE / 'search.html').as_uri()}?q=write_certificate"
    done = look(address, "--dump-dom", "--enable-logging=stderr", "--virtual-time-budget=4000")
    assert "docs/api.html#marl_core.write_certificate" in done.stdout
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_search_shows_what_stands_around_the_words(look: Look) -> None:
    address = f"{(SITE / 'search.html').as_uri()}?q=step-0%20KL"
    done = look(address, "--dump-dom", "--virtual-time-budget=4000")
    excerpts = re.findall(r'<p class="context">(.*?)</p>', done.stdout)
    assert len(excerpts) > 5
    assert any(
        {"step-0", "kl"} <= {word.lower() for word in re.findall("<mark>(.*?)</mark>", text)} for text in excerpts
    )
    assert all(len(re.sub("<[^>]+>", "", text)) < 300 for text in excerpts)


def found(look: Look, query: str) -> list[tuple[str, str]]:
    """What the search shows, in its order: where it leads, and the excerpt with its marks."""
    address = f"{(SITE / 'search.html').as_uri()}?q={quote(query)}"
    text = look(address, "--dump-dom", "--virtual-time-budget=4000").stdout
    (listed,) = re.findall(r'<ul[^>]*class="search".*?</ul>', text, re.DOTALL)
    items = re.findall(r'<a href="([^"]*)".*?(?=<a href|</ul>)', listed, re.DOTALL)
    return [
        (re.sub(r"[?#].*", "", item), part) for item, part in zip(items, re.split("<a href", listed)[1:], strict=True)
    ]


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("out of memory", "docs/trouble.html"),
        ("memory ends", "docs/trouble.html"),
        ("samples.jsonl", "docs/run-folder.html"),
        ("reward function", "docs/rewards.html"),
        ("chat template", "docs/data.html"),
        ("resume", "docs/trouble.html"),
        ("AdapterBank", "docs/api.html"),
    ],
)
def test_a_search_names_the_page_for_it_first(look: Look, query: str, first: str) -> None:
    pages = [page for page, _ in found(look, query)]
    assert first in pages[:2]
    readers = [
        page
        for page in pages
        if not re.match(r"CHANGELOG|docs/(api|reliability|architecture|upstream)|benchmarks", page)
    ]
    last = [
        page for page in pages if page not in readers and page != "docs/api.html"
    ]  # names of the API keep their place
    assert len(readers) > 1
    assert [page for page in pages if page != "docs/api.html"] == readers + last


def test_a_word_is_marked_as_a_word(look: Look) -> None:
    marks = [
        mark.lower() for _, text in found(look, "out of memory") for mark in re.findall("<mark>(.*?)</mark>", text)
    ]
    excerpts = [re.sub("</?mark>", "|", re.sub("</?span>", "", text)) for _, text in found(look, "out of memory")]
    assert {"out", "of", "memory"} <= set(marks)
    assert not [text for text in excerpts if re.search(r"\w\|(out|of|memory)\||\|(out|of)\|\w", text, re.IGNORECASE)]


def test_code_has_a_button_that_copies_it(look: Look) -> None:
    done = look((SITE / "index.html").as_uri(), "--dump-dom", "--virtual-time-budget=4000")
    assert done.stdout.count('class="copybtn') == done.stdout.count("<pre") > 3


@pytest.mark.parametrize(
    "page", ["index.html", "docs/config.html", "docs/first-hour.html", "docs/cli.html", "docs/models.html"]
)
def test_a_page_fits_a_telephone(look: Look, page: str, tmp_path: Path) -> None:
    """Nothing but code and wide tables, which scroll by themselves, is wider than the window; a frame is as narrow as one asks for."""
    frame = tmp_path / "frame.html"
    script = "onload = () => document.title = 'width ' + frames[0].document.documentElement.scrollWidth"
    frame.write_text(f'<iframe src="{(SITE / page).as_uri()}" width=390 height=800></iframe><script>{script}</script>')
    done = look(frame.as_uri(), "--dump-dom", "--virtual-time-budget=4000", "--allow-file-access-from-files")
    assert "<title>width 390</title>" in done.stdout


@pytest.mark.parametrize(("width", "hidden"), [(1280, 0), (390, 160)])
def test_the_table_of_models_is_in_sight(look: Look, width: int, hidden: int, tmp_path: Path) -> None:
    """All of it on a laptop; on a telephone most of it, and the model's name stays where it is while the rest is scrolled."""
    frame = tmp_path / "frame.html"
    script = """onload = () => {
      const box = frames[0].document.querySelector("#which-models-work .table-wrapper"), name = box.querySelector("td");
      const before = name.getBoundingClientRect().left, out = box.scrollWidth - box.clientWidth;
      box.scrollLeft = out;
      document.title = `hidden ${out} moved ${Math.round(name.getBoundingClientRect().left - before)}`;
    }"""
    page = (SITE / "docs" / "models.html").as_uri()
    frame.write_text(f'<iframe src="{page}" width={width} height=800></iframe><script>{script}</script>')
    done = look(frame.as_uri(), "--dump-dom", "--virtual-time-budget=4000", "--allow-file-access-from-files")
    (numbers,) = re.findall(r"<title>hidden (\d+) moved (-?\d+)</title>", done.stdout)
    assert int(numbers[0]) <= hidden
    assert abs(int(numbers[1])) <= 1


@pytest.mark.parametrize("page", ["index.html", "docs/plugins.html", "docs/api.html", "examples/README.html"])
def test_a_page_is_drawn(look: Look, page: str, tmp_path: Path) -> None:
    import matplotlib.image

    picture = Path(os.environ.get("MARL_SCREENSHOTS", tmp_path)) / f"site-{page.replace('/', '-')}.png"
    look((SITE / page).as_uri(), f"--screenshot={picture}", "--window-size=1700,1000")
    pixels = (matplotlib.image.imread(picture)[..., :3] * 255).astype(int)
    assert pixels.shape == (1000, 1700, 3)
    menu, text, end = (pixels[:, a:b].min(axis=-1) for a, b in ((20, 280), (340, 1360), (1690, 1700)))
    assert float((menu < 120).mean()) > 0.01, "the menu is not there"
    assert float((text < 120).mean()) > 0.02, "the text is not there"
    assert not (end < 120).any(), "something runs over the page's edge"
