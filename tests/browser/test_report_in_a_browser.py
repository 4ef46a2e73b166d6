"""The report looked at in headless Chromium, light and dark: it draws, its script runs, nothing is refused or loaded.

`make browser` runs this; `-m "not browser"` leaves it out. MARL_BROWSER names a browser that isn't on the PATH.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marl_core.report.page import write_report

pytestmark = pytest.mark.browser

DARK = "--blink-settings=preferredColorScheme=0"
LIGHT = "--blink-settings=preferredColorScheme=1"
Look = Callable[..., Any]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    return write_report([write_run(root / "first", 1), write_run(root / "second", 2)], root / "report.html")


def write_run(folder: Path, seed: int) -> Path:
    """Forty steps of a made-up run whose prompts try to be HTML."""
    chance = random.Random(seed)
    folder.mkdir()
    (folder / "config.yaml").write_text(
        f"model: {{path: base}}\nppo: {{steps: 40}}\nrun: {{seed: {seed}}}\n", encoding="utf-8"
    )
    words = ["A ", "wonderful ", "and ", "<b>bold</b> ", "moving ", "film."]
    ends = [sum(map(len, words[: i + 1])) for i in range(len(words))]
    steps, samples = [], []
    for step in range(1, 41):
        rise = 1 - math.exp(-step / 15)
        seconds = {"generate": 2.0, "score": 1.0, "update": 2.5}
        steps.append(
            {
                "step": step,
                "objective/scores": 4 * rise + chance.gauss(0, 0.2),
                "objective/kl": 8 * rise + chance.gauss(0, 0.3),
                "policy/clipfrac": 0.1 + chance.gauss(0, 0.02),
                "perf/seconds": sum(seconds.values()),
                **{f"perf/seconds_{name}": spent + chance.random() for name, spent in seconds.items()},
            }
        )
        kl = [round(chance.gauss(0.3 * rise, 0.8), 3) for _ in words]
        samples.append(
            {
                "step": step,
                "prompt": "<img src=x onerror=document.title='hacked'>",
                "response": "".join(words),
                "score": 4 * rise,
                "parts": {"judge": 4 * rise, "brevity": -0.5},
                "kl_nats": sum(kl),
                "finished": True,
                "token_ends": ends,
                "token_kl": kl,
            }
        )
    for name, lines in (("steps", steps), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def test_the_script_runs_and_nothing_is_refused(look: Look, report: Path) -> None:
    done = look(report.as_uri(), "--dump-dom", "--enable-logging=stderr", "--virtual-time-budget=2000")
    assert 'data-ready="1"' in done.stdout
    assert "80 shown" in done.stdout
    assert "<title>first · second – marl report</title>" in done.stdout  # the prompt stayed a text
    assert "<img" not in done.stdout
    told = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not told


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_it_is_drawn(look: Look, report: Path, scheme: str, tmp_path: Path) -> None:
    import matplotlib.image
    import numpy

    picture = Path(os.environ.get("MARL_SCREENSHOTS", tmp_path)) / f"{'dark' if scheme == DARK else 'light'}.png"
    look(report.as_uri(), scheme, f"--screenshot={picture}", "--window-size=1280,2400")
    pixels = (matplotlib.image.imread(picture)[..., :3] * 255).astype(int)
    assert pixels.shape == (2400, 1280, 3)
    paper = (19, 20, 23) if scheme == DARK else (255, 255, 255)
    assert tuple(pixels[2, 2]) == paper
    for ink in ((122, 167, 255), (240, 160, 80)) if scheme == DARK else ((37, 99, 235), (194, 98, 10)):
        assert int(numpy.all(abs(pixels - ink) <= 8, axis=-1).sum()) > 300, f"the curves in {ink} are not there"
    assert float((abs(pixels - paper).sum(axis=-1) > 60).mean()) > 0.02
    right = pixels[:, -8:]
    assert int((abs(right - paper).sum(axis=-1) > 60).sum()) == 0, "something runs over the page's edge"
