"""The report looked at in headless Chromium, light and dark: it draws, its script runs, nothing is refused or loaded.

`make browser` runs this; `-m "not browser"` leaves it out. MARL_BROWSER names a browser that isn't on the PATH.
"""

from __future__ import annotations

import html
import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marl_core.report.page import write_report
from marl_core.report.values import write_csv

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
                "time": 1000.0 + 10 * step + (5000 if step > 20 else 0),
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
    evaluations: list[dict[str, Any]] = [
        {"step": step, "reward": step / 10, "kl": 1.0, "length": 3.0, "judges": {}, "samples": [sample(step)]}
        for step in (0, 20, 40)
    ]
    sessions = [{"how": "start", "step": 0, "time": 1000.0}, {"how": "resume", "step": 20, "time": 6200.0}]
    (folder / "provenance.json").write_text(json.dumps({"sessions": sessions}), encoding="utf-8")
    for name, lines in (("steps", steps), ("samples", samples), ("evals", evaluations)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def sample(step: int) -> dict[str, Any]:
    return {"prompt": "The <i>sea", "response": f"at step {step}", "score": step / 10, "kl": 1.0, "row": {"answer": 13}}


def after(look: Look, page: Path, script: str, *options: str) -> str:
    """The title that a script set, run in the page when its own scripts had run."""
    with_script = page.with_name("with-a-script.html")
    text = page.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>")
    with_script.write_text(text, encoding="utf-8")
    done = look(
        with_script.as_uri(),
        "--dump-dom",
        *(options or ()),
        *([] if any("virtual" in option for option in options) else ["--virtual-time-budget=2000"]),
    )
    return str(done.stdout.split("<title>")[1].split("</title>")[0])


CHOOSE = """
const choose = (id, value) => { const field = document.getElementById(id);
  if (field.type === "checkbox") field.checked = value; else field.value = value;
  field.dispatchEvent(new Event("input")); };
const card = document.querySelector('.card[data-metric="objective/kl"]'), has = (what) => card.querySelectorAll(what).length;
const labels = () => [...card.querySelectorAll(".x")].map((node) => node.textContent).join(" ");
const drag = (from, to) => {
  const svg = card.querySelector("svg"), box = svg.getBoundingClientRect(); svg.setPointerCapture = () => {};
  for (const [kind, at] of [["down", from], ["move", to], ["up", to]])
    svg.dispatchEvent(new PointerEvent("pointer" + kind, { clientX: box.left + at * box.width, clientY: box.top + 40, button: 0 }));
};
"""


class TestCurves:
    @pytest.mark.parametrize(
        ("chosen", "told"),
        [
            ("", "2 lines, 0 faint, 2 resumed, 10 20 30 40"),
            ("choose('curve-smooth', 0.9);", "4 lines, 2 faint, 2 resumed, 10 20 30 40"),
            ("choose('curve-x', 'elapsed');", "2 lines, 0 faint, 2 resumed, 2 min 4 min 6 min"),
        ],
    )
    def test_what_is_chosen_is_drawn(self, look: Look, report: Path, chosen: str, told: str) -> None:
        say = "document.title = `${has('polyline')} lines, ${has('.faint')} faint, ${has('.resumed')} resumed, ${labels()}`;"
        assert after(look, report, CHOOSE + chosen + say, "--window-size=1280,1000") == told

    def test_a_log_axis_has_powers_of_ten(self, look: Look, report: Path) -> None:
        say = "document.title = [...card.querySelectorAll('.y')].map((node) => node.textContent).join(' ');"
        assert after(look, report, CHOOSE + "choose('curve-log', true);" + say) in ("0.1 1 10", "0.01 0.1 1 10")

    def test_on_a_log_axis_a_line_is_broken_at_zero(self, look: Look, tmp_path: Path) -> None:
        """0 in steps 5 to 12 and from 33 on: two pieces, and the axis still goes to the last step."""
        folder = write_run(tmp_path / "run", 1)
        lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
        for line in lines:
            line["objective/kl"] = 0.0 if 5 <= line["step"] <= 12 or line["step"] >= 33 else 2.0
        (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        page = write_report(folder, tmp_path / "report.html")
        say = """
        const counts = [...card.querySelectorAll("polyline")].map((line) => line.getAttribute("points").split(" ").length);
        document.title = [counts.join("+"), labels(), card.querySelector(".missing:not([hidden])")?.textContent].join(" | ");
        """
        size = "--window-size=1280,1000"
        assert after(look, page, CHOOSE + say, size) == "40 | 10 20 30 40 | "
        told = after(look, page, CHOOSE + "choose('curve-log', true);" + say, size)
        assert told == "4+20 | 10 20 30 40 | 16 steps with 0 or less: not shown on a log axis"
        smooth = "choose('curve-smooth', 0.5); choose('curve-log', true);"
        told = after(look, page, CHOOSE + smooth + say, size)
        assert told == "4+20+40 | 10 20 30 40 | 16 steps with 0 or less: not shown on a log axis"

    def test_a_part_is_chosen_by_dragging(self, look: Look, report: Path) -> None:
        chosen = """
        drag(0.5, 0.7);
        const part = labels(); card.querySelector("svg").dispatchEvent(new MouseEvent("dblclick"));
        document.title = part + " | " + labels();
        """
        part, whole = after(look, report, CHOOSE + chosen, "--window-size=1280,1000").split(" | ")
        assert set(part.split()) < {str(step) for step in range(16, 30)}
        assert whole == "10 20 30 40"

    def test_values_are_a_file(self, look: Look, report: Path) -> None:
        take = """
        let parts; const Plain = Blob; window.Blob = function (given, options) { parts = given; return new Plain(given, options); };
        HTMLAnchorElement.prototype.click = function () {
          document.title = this.download + " " + parts[0].split("\\n").slice(0, 2).join(" "); };
        document.querySelector("[data-csv='1']").click();
        """
        assert after(look, report, take).startswith("second.csv step,time,date,elapsed,objective/scores,objective/kl,")

    def test_the_page_s_file_is_that_of_the_command(self, look: Look, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "run", 1)
        command = write_csv([folder], tmp_path / "values.csv").read_text(encoding="utf-8").splitlines()
        take = """
        const Plain = Blob; let parts; window.Blob = function (given, options) { parts = given; return new Plain(given, options); };
        HTMLAnchorElement.prototype.click = function () {
          document.title = [0, 30].map((i) => parts[0].split("\\n")[i].split(",").slice(0, 4)).join(" / "); };
        document.querySelector("[data-csv='0']").click();
        """
        told = after(look, write_report(folder, tmp_path / "report.html"), take)
        rows = [",".join(command[index].split(",")[:4]).replace(".0", "") for index in (0, 30)]
        assert told == " / ".join(rows)
        assert rows[0] == "step,time,date,elapsed"


def test_on_a_telephone_the_head_of_the_samples_is_one_line(look: Look, report: Path) -> None:
    script = (
        "document.title = new Set([...document.querySelectorAll('#samples-table th')].map((th) => th.offsetTop)).size;"
    )
    assert after(look, report, script, "--window-size=500,900") == "1"


def test_held_out_texts_are_shown_and_hidden(look: Look, report: Path) -> None:
    script = """
    const shown = () => [...document.querySelectorAll(".version:not([hidden]) .response")].map((node) => node.textContent).join(", ");
    const before = shown(); document.querySelector("#versions [data-key='0-20']").click();
    document.title = before + " | " + shown();
    """
    before, later = after(look, report, script).split(" | ")
    assert before == "at step 0, at step 40, at step 40"
    assert later == "at step 0, at step 20, at step 40, at step 40"


def test_a_tap_on_a_token_tells_its_number(look: Look, report: Path) -> None:
    script = "document.querySelector('.t').click(); document.title = document.querySelector('.tip:not([hidden])').textContent;"
    assert after(look, report, script).endswith(" nats")


def test_a_live_page_reloads_and_is_where_it_was(look: Look, tmp_path: Path) -> None:
    """Scrolled, zoomed, sorted and unfolded, though a metric more stands at the beginning of the next page."""
    page = write_report(write_run(tmp_path / "run", 1), tmp_path / "live.html", live=True)
    more = """
    if (sessionStorage.getItem("here")) {
      const first = document.querySelector(".card"), added = first.cloneNode(true);
      added.dataset.metric = "added"; first.before(added);
    }
    """
    text = page.read_text(encoding="utf-8").replace("<script>", f"<script>{{ {more} }}</script><script>", 1)
    page.write_text(text, encoding="utf-8")
    script = """
    const get = (id) => document.getElementById(id), middle = document.querySelector("#versions [data-key='0-20']");
    const column = document.querySelector('[data-sort="step"]');
    const seen = () => [get("curve-x").value, get("curve-log").checked, middle.getAttribute("aria-pressed"), Math.round(scrollY),
      labels(), get("curve-whole").hidden, column.dataset.down, document.querySelector("#samples-table tbody tr").dataset.step,
      ...[...document.querySelectorAll("details[open]")].map((fold) => fold.closest("[data-metric], section").dataset.metric)].join(" ");
    if (sessionStorage.getItem("here")) {
      for (let timer = 0; timer < 1000; timer++) clearInterval(timer);
      document.title = `${sessionStorage.getItem("here")} | ${seen()}`;
    } else {
      choose("curve-x", "elapsed"); choose("curve-log", true); drag(0.5, 0.8);
      document.querySelector("details").open = true; middle.click(); window.scrollTo(0, 700);
      column.click(); column.click();
      sessionStorage.setItem("here", seen());
    }
    """
    told = after(look, page, CHOOSE + script, "--virtual-time-budget=15000", "--window-size=1280,1000")
    before, now = told.split(" | ")
    assert now == before
    assert before.startswith("elapsed true true 700 ")
    assert before.endswith(" false 0 1 objective/scores")


def test_a_copy_in_a_notebook_reloads_nothing(look: Look, tmp_path: Path) -> None:
    """There is no page behind it: loading it again would leave an empty frame."""
    page = write_report(write_run(tmp_path / "run", 1), tmp_path / "live.html", live=True)
    script = """
    setTimeout(() => { parent.document.title = [location.href, document.getElementById("live").hidden].join(" "); }, 12500);
    """
    text = page.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>")
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f'<title>none</title><iframe srcdoc="{html.escape(text)}"></iframe>', encoding="utf-8")
    done = look(notebook.as_uri(), "--dump-dom", "--virtual-time-budget=15000")
    assert done.stdout.split("<title>")[1].split("</title>")[0] == "about:srcdoc true"


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_nothing_is_cut_on_a_telephone(look: Look, report: Path, scheme: str) -> None:
    frame = report.with_name("telephone.html")
    frame.write_text(
        f'<iframe src="{report.name}" style="width:390px;height:800px;border:0"></iframe>', encoding="utf-8"
    )
    script = """
    const wide = [...document.querySelectorAll("main *")].filter((node) => node.getClientRects().length
      && node.getBoundingClientRect().right > innerWidth + 1 && !node.closest("pre, svg, [hidden]"));
    const name = document.querySelector("#summary td").getBoundingClientRect().width;
    const told = [...new Set(wide.map((node) => node.tagName + "." + node.className))];
    parent.document.title = [innerWidth, name > 300, ...told].join(" ");
    """
    within = report.with_name("within.html")
    text = report.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>")
    within.write_text(text, encoding="utf-8")
    frame.write_text(frame.read_text(encoding="utf-8").replace(report.name, within.name), encoding="utf-8")
    done = look(frame.as_uri(), scheme, "--dump-dom", "--virtual-time-budget=2000", "--allow-file-access-from-files")
    assert done.stdout.split("<title>")[1].split("</title>")[0] == "390 true"


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
