"""The site of the docs from plain files, without a network: its pages are drawn, its search finds, no script complains."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
