"""The report page: what it shows, that nothing generated becomes HTML, that it asks no network for anything."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from marl_core import DataError, Runner, show_report
from marl_core.report.charts import ticks
from marl_core.report.page import number, page, write_report
from marl_core.report.run_data import read_runs
from marl_core.report.values import write_csv

EVIL = '<script>alert("x")</script>&amp;\'"'
STEP = {
    "objective/scores": 1.0,
    "objective/kl": 0.5,
    "perf/seconds": 3.0,
    "perf/seconds_generate": 2.0,
    "perf/seconds_update": 1.0,
}


class Page(HTMLParser):
    """Elements, and the text inside each kind of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for name in set(self.open):
            self.texts[name] = self.texts.get(name, "") + data

    def count(self, name: str, **attributes: str) -> int:
        return sum(
            element == name and all(found.get(key.rstrip("_")) == value for key, value in attributes.items())
            for element, found in self.elements
        )


def write_run(folder: Path, steps: int = 3, learning_rate: float = 1e-4) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"model: {{path: '{EVIL.replace(chr(39), '')}'}}\nppo: {{steps: {steps}, learning_rate: {learning_rate}}}\n",
        encoding="utf-8",
    )
    lines = [{"step": i + 1, **STEP, "objective/scores": float(i)} for i in range(steps)]
    sample = {
        "step": 1,
        "prompt": EVIL,
        "response": EVIL,
        "score": 1.5,
        "parts": {EVIL: 1.0, "b": 2.0},
        "kl_nats": 0.3,
        "finished": False,
    }
    evaluation = {
        "step": 0,
        "reward": 1.0,
        "reward_std": 0.1,
        "kl": 0.0,
        "kl_std": 0.0,
        "length": 3.0,
        "length_std": 0.0,
        "finished": 1.0,
        "judges": {EVIL: {"mean": 0.25, "std": 0.5}},
        "samples": [],
    }
    for name, found in (("steps", lines), ("samples", [sample]), ("evals", [evaluation])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")
    (folder / "preflight.json").write_text(
        json.dumps({"ok": True, "checks": [{"name": "ratio", "ok": False, "detail": EVIL}]}), encoding="utf-8"
    )
    (folder / "provenance.json").write_text(json.dumps({"seed": 7, "strategies": [EVIL]}), encoding="utf-8")
    return folder


def test_nothing_that_a_run_wrote_becomes_html(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "a<b>")).read_text(encoding="utf-8")
    found = Page(text)
    assert not found.open
    assert [attributes.get("type") for name, attributes in found.elements if name == "script"] == [
        "application/json",
        None,
    ]
    assert EVIL not in text
    for place in ("td", "li", "pre", "h1"):
        assert ("<b>" if place == "h1" else "<script>") in found.texts[place], place  # as text


def test_it_loads_nothing(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    found = Page(text)
    assert found.count("meta", content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'") == 1
    loading = {"src", "srcset", "action", "background"}
    assert not [attributes for _, attributes in found.elements if loading & set(attributes)]
    places = [(name, attributes["href"] or "") for name, attributes in found.elements if "href" in attributes]
    assert all(name == "a" and place.startswith("#") for name, place in places)  # within the page
    assert "http://" not in text.replace("http-equiv", "")
    assert "url(" not in text
    assert "@import" not in text


def test_two_runs_lie_over_each_other(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", steps=5, learning_rate=3e-4)]
    path = write_report(runs)
    assert path == runs[0] / "comparison.html"
    found = Page(path.read_text(encoding="utf-8"))
    rewards = [a for name, a in found.elements if name == "polyline"][:2]
    assert [a["data-name"] for a in rewards] == ["one", "two"]
    values = json.loads(found.texts["script"].partition("\n")[0].partition('"use strict"')[0])["runs"][1]
    assert (values["steps"], values["values"]["objective/scores"]) == ([1, 2, 3, 4, 5], [0, 1, 2, 3, 4])
    assert found.count("option", value="1") == 2  # the run to choose, and the step
    assert "ppo.learning_rate" in found.texts["code"]
    assert found.count("span", class_="phase p-0", title="generate: 2.000 s a step") == 2


def test_a_notebook_shows_the_page_of_one_run_or_several(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    shown = show_report(one, height=300)
    assert shown.path == one / "report.html"
    frame = shown._repr_html_()
    assert 'height="300"' in frame
    assert html.unescape(frame.partition('srcdoc="')[2].partition('" width')[0]) == shown.path.read_text(
        encoding="utf-8"
    )
    assert show_report(one, two).path == show_report([one, two]).path == one / "comparison.html"
    with pytest.raises(DataError):
        show_report(one, tmp_path / "none")


@pytest.mark.parametrize("given", [(), ([],), (500,), ("run", 500), (["run", 500],), (None,)])
def test_what_is_no_run_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[Any, ...]) -> None:
    """Such as a height that lacks its name."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    with pytest.raises(DataError, match=r"show_report: .* Give the run\.folder"):
        show_report(*given)


def test_same_names_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")]
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]


def test_a_run_without_steps_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}", encoding="utf-8")
    assert "No step has ended yet. The run was stopped" in page(read_runs([tmp_path]))


def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "preflight.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match=r"preflight\.json holds a list"):
        write_report(folder)
    (folder / "config.yaml").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"config\.yaml: not a valid config"):
        write_report(folder)
    with pytest.raises(DataError, match="holds no run"):
        write_report(tmp_path)


def test_numbers_of_a_damaged_run_are_an_error_too(tmp_path: Path) -> None:
    folder, table = write_run(tmp_path / "run"), tmp_path / "numbers.csv"
    with pytest.raises(DataError, match=r"numbers.csv/x.csv can't be written"):
        write_csv([folder], write_csv([folder], table) / "x.csv")
    with pytest.raises(DataError, match=r"numbers.csv/x.html can't be written"):
        write_report(folder, table / "x.html")
    (folder / "preflight.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match=r"preflight\.json holds a list"):
        write_csv([folder], table)
    (folder / "preflight.json").unlink()
    (folder / "config.yaml").write_bytes(b"\xff\0")
    with pytest.raises(DataError, match="is damaged or can't be read"):
        write_csv([folder], table)
    (folder / "steps.jsonl").write_text('{"step": {}}\n', encoding="utf-8")
    with pytest.raises(DataError, match="is damaged or can't be read"):
        write_csv([folder], table)


def write_evaluations(folder: Path, steps: list[int], prompts: int = 1) -> None:
    """Evaluations whose score is their step, with the texts to so many prompts."""
    lines = [
        {
            "step": step,
            "reward": float(step),
            "kl": 0.0,
            "length": 3.0,
            "judges": {},
            "samples": [{"prompt": str(prompt), "response": "r", "score": float(step)} for prompt in range(prompts)],
        }
        for step in steps
    ]
    (folder / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_what_a_difference_is_to_is_said(tmp_path: Path) -> None:
    """A run that was resumed in a new folder, or whose first texts weren't kept, has no evaluation before training."""
    whole, later = write_run(tmp_path / "whole"), write_run(tmp_path / "later")
    write_evaluations(whole, [0, 2])
    write_evaluations(later, [1, 3])
    before = "difference is to the score before training."
    assert before in page(read_runs([whole]))
    for runs in ([later], [whole, later]):
        assert before not in page(read_runs(runs))
        assert "difference is to the score in the first evaluation of its run." in page(read_runs(runs))


def test_prompts_that_are_left_out_are_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_evaluations(folder, [0], prompts=60)
    assert "40 of 60 prompts." in page(read_runs([folder]))
    write_evaluations(folder, [0], prompts=40)
    assert "of 40 prompts" not in page(read_runs([folder]))


def shown_sample(folder: Path, **sample: Any) -> Page:
    """The page of a run that wrote this one sample."""
    write_run(folder)
    line = {"step": 1, "prompt": "p", "score": 1.0, **sample}
    (folder / "samples.jsonl").write_text(json.dumps(line), encoding="utf-8")
    return Page(page(read_runs([folder])))


def test_tokens_make_up_the_response_and_carry_their_kl(tmp_path: Path) -> None:
    tokens = {"token_ends": [1, 1, 3, 5, 5], "token_kl": [0.0, 0.1, 1.0, -4.0, 0.5]}
    found = shown_sample(tmp_path / "run", finished=True, response="né &!", **tokens)
    assert "né &!⏎" in found.texts["td"]
    spans = [a for name, a in found.elements if name == "span" and str(a.get("class")).startswith("t ")]
    assert [span.get("style") for span in spans] == [None, "--k:0.50", "--k:1.00", "--k:0.25"]
    assert [span["class"] for span in spans] == ["t cool", "t warm", "t cool", "t warm end"]
    assert spans[2]["title"] == "-4.000 nats"


def test_white_space_of_a_response_is_kept(tmp_path: Path) -> None:
    text = "  a\n\n b <i>\n"
    folder = tmp_path / "run"
    shown_sample(folder, prompt=text, response=text)
    plain = text.replace("<", "&lt;").replace(">", "&gt;")
    whole = page(read_runs([folder]))
    assert f'<div class="prompt">{plain}</div>' in whole
    assert f'<div class="response">{plain}</div>' in whole
    shown_sample(tmp_path / "other", response=text, token_ends=[3, 6, len(text)], token_kl=[0.0, 0.0, 1.0])
    inside = page(read_runs([tmp_path / "other"])).split('<div class="response">')[1].split("</div>")[0]
    found = Page(f"<p>{inside}</p>")
    assert found.texts["p"] == text


def test_a_chat_is_shown_with_its_roles_and_texts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image"}]
    line = {"step": 1, "prompt": [{"role": "user", "content": parts}], "response": "A cat.", "score": 1.0}
    (folder / "samples.jsonl").write_text(json.dumps(line), encoding="utf-8")
    shown = page(read_runs([folder]))
    assert '<span class="role">user</span> What is this? [image]</div>' in shown


def test_a_metric_is_read_by_its_older_name(tmp_path: Path) -> None:
    names = ("policy/approxkl", "policy/approx_kl")
    for name in names:
        folder = write_run(tmp_path / name.replace("/", "-"))
        (folder / "steps.jsonl").write_text(json.dumps({"step": 1, name: 0.25}), encoding="utf-8")
    runs = read_runs([tmp_path / name.replace("/", "-") for name in names])
    assert [run.curve("policy/approx_kl") for run in runs] == [[(1, 0.25)]] * 2
    assert page(runs).count('data-metric="policy/approx_kl"') == 1


def test_a_run_folder_of_the_code_before_has_its_page(tmp_path: Path) -> None:
    older = Path(__file__).parents[1] / "older" / "house" / "run"
    found = Page(write_report(older, tmp_path / "report.html").read_text(encoding="utf-8"))
    assert found.count("figure", title="policy/approx_kl") == 1
    sections = [attributes["id"] for name, attributes in found.elements if name == "section"]
    assert sections == [
        "summary",
        "run",
        "curves",
        "seconds-by-phase",
        "held-out",
        "before-and-after",
        "pre-flight",
        "samples",
        "provenance",
    ]
    assert "2026-" in found.texts["dd"]  # when it was started, by its steps' times


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0.0, "0"),
        (12, "12"),
        (0.12345, "0.123"),
        (123.4, "123"),
        (1e-5, "1.00e-05"),
        ("x", "x"),
    ],
)
def test_numbers(value: Any, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 0.9, [0, 0.5, 1]),
        (-2.4, -2.0, [-2.4, -2.2, -2.0]),
        (5, 5, [2, 4, 6, 8]),
        (1, 30, [0, 10, 20, 30]),
    ],
)
def test_ticks_are_round_and_cover(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 3) == pytest.approx(expected)


@pytest.mark.parametrize("value", [1.0, -3e7, 1e-300])
def test_ticks_of_values_that_are_nearly_equal_differ(value: float) -> None:
    """As rounding leaves them: the next number that a float can hold is no range."""
    found = ticks(value, math.nextafter(value, math.inf), 4)
    assert len(set(found)) == len(found)
    assert min(found) < value < max(found)


def test_a_real_run_writes_where_each_token_ends(make_config: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Runner(make_config(run={"folder": str(folder)}, observers=["json-lines"])).train()
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 8
    for line in lines:
        assert line["token_ends"] == sorted(line["token_ends"])
        assert line["token_ends"][-1] <= len(line["response"])
        assert sum(line["token_kl"]) == pytest.approx(line["kl_nats"], abs=0.01)
    assert 'class="t ' in (folder / "report.html").read_text(encoding="utf-8")
