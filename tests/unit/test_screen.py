"""The console: plain lines in a pipe, a bar on a terminal; and what samples.jsonl says about tokens."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from marl_core import Rollout, RunResult, ScoredRollout, StepStats
from marl_core.testing import fake_rollout, tiny_tokenizer
from marl_plugins.prompt_text import readable
from marl_plugins.samples import sample_rows, token_ends
from marl_plugins.screen import Screen, minutes, sparkline

METRICS = {
    "objective/scores": 1.25,
    "objective/kl": 2.0,
    "policy/clipfrac": 0.1,
    "objective/entropy": 3.0,
    "tokens/mean_length": 7.5,
    "tokens/finished": 0.5,
    "perf/tokens_per_second": 123.0,
}


def test_sparkline() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == "▄▄"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7, float("nan")], width=2) == "▁█"
    assert len(sparkline(list(range(1000)))) == 24


def scored_of(rollout: Rollout) -> ScoredRollout:
    return ScoredRollout(rollout, torch.zeros(rollout.ids.shape), None, None, torch.zeros(len(rollout)))


def shown(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> str:
    out = io.StringIO()
    monkeypatch.setattr("marl_plugins.screen.Console", lambda: Console(file=out, force_terminal=terminal, width=140))
    scored = scored_of(fake_rollout())
    screen = Screen(2, 0, 2)
    for step in (1, 2):
        screen.step(StepStats(step, {**METRICS, "objective/scores": float(step)}), scored)
    screen.close(RunResult("runs/x", 2, None))
    return out.getvalue()


def test_plain_lines_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, terminal=False)
    assert "\x1b" not in text
    assert [line.split()[:3] for line in text.splitlines()[1:3]] == [["1", "1.000", "2.00"], ["2", "2.000", "2.00"]]
    assert text.count("sample (") == 1
    assert "final adapter in runs/x/final/policy" in text


def test_the_header_stands_right_above_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("marl_plugins.screen.Console", lambda: Console(file=out, width=140))
    screen = Screen(2, 0, 0)
    assert out.getvalue() == ""  # the roles and the pre-flight check are told here
    screen.step(StepStats(1, METRICS), scored_of(fake_rollout()))
    screen.step(StepStats(2, METRICS), scored_of(fake_rollout()))
    assert [line.split()[0] for line in out.getvalue().splitlines()] == ["step", "1", "2"]


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is\n2 + 3?"}, {"type": "image"}]},
]


def test_a_chat_is_shown_as_a_person_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("marl_plugins.screen.Console", lambda: Console(file=out, width=140))
    rollout = fake_rollout()
    chats = replace(rollout, prompts=replace(rollout.prompts, texts=[CHAT] * len(rollout)), texts=["5"] * len(rollout))
    Screen(1, 0, 1).step(StepStats(1, METRICS), scored_of(chats))
    assert [line.strip() for line in out.getvalue().splitlines()[2:]] == [
        "sample (0.00):",
        "system: Be brief.",
        "user: What is 2 + 3? [image]",
        "assistant: 5",
    ]


def test_a_sample_stays_on_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("marl_plugins.screen.Console", lambda: Console(file=out, width=140))
    rollout = fake_rollout()
    broken = replace(rollout, prompts=replace(rollout.prompts, texts=["Q:\nA:"] * 3), texts=[" one\r\n\ntwo\n"] * 3)
    Screen(1, 0, 1).step(StepStats(1, METRICS), scored_of(broken))
    assert [line.strip() for line in out.getvalue().splitlines()[2:]] == ["sample (0.00): Q:⏎A: one⏎⏎two⏎"]


@pytest.mark.parametrize("seconds", [50.0, 400.0])
def test_the_bar_has_the_time_left_of_the_step_s_line(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Whatever a step lasts, and going down while the next one is on its way."""
    out, now = io.StringIO(), [1000.0]
    monkeypatch.setattr("marl_plugins.screen.Console", lambda: Console(file=out, force_terminal=True, width=140))
    monkeypatch.setattr("marl_plugins.screen.time.perf_counter", lambda: now[0])
    screen = Screen(3, 0, 0)
    assert "left -:--" in screen_bar(screen)
    now[0] += seconds
    screen.step(StepStats(1, METRICS), scored_of(fake_rollout()))
    assert f" {minutes(2 * seconds)}\n" in out.getvalue().replace("\r\n", "\n")
    assert f"left {minutes(2 * seconds)}" in screen_bar(screen)
    now[0] += 20
    assert f"left {minutes(2 * seconds - 20)}" in screen_bar(screen)
    screen.stop()


def screen_bar(screen: Screen) -> str:
    """The bar as it stands."""
    out = io.StringIO()
    Console(file=out, width=140).print(screen._bar.get_renderable())
    return out.getvalue()


def test_a_long_prompt_is_shortened_and_an_opened_answer_goes_on() -> None:
    assert readable("short") == "short"
    assert readable("a" * 400 + "z") == "... " + "a" * 299 + "z"  # the end: what the response goes on with
    opened = readable([{"role": "user", "content": "b" * 400}, {"role": "assistant", "content": "The answer is"}])
    assert opened.split("\n") == ["", " " * 11 + "user: " + "b" * 300 + " ...", " " * 11 + "assistant: The answer is"]


def test_a_bar_with_the_rewards_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, terminal=True)
    assert "▁█" in text
    assert "2/2" in text


@pytest.mark.parametrize("text", ["plain words here, and some more of them", "né – “日本語” 🙂 end", ""])
def test_token_ends_cover_the_text(text: str) -> None:
    words = tiny_tokenizer()
    ids = [*words(text).input_ids, words.eos_token_id]
    ends = token_ends(ids, len(text), words)
    assert len(ends) == len(ids)
    assert ends == sorted(ends)
    assert ends[-1] == len(text)
    expected = [len(text.encode()[: i + 1].decode(errors="ignore")) for i in range(len(ids) - 1)]  # a byte a token
    assert ends[:-1] == expected


def test_sample_rows_without_a_reference_have_no_kl() -> None:
    rollout = fake_rollout()
    scored: Any = ScoredRollout(rollout, torch.zeros(rollout.ids.shape), None, None, torch.zeros(3))
    (row,) = sample_rows(StepStats(1, {}), scored, 1, tiny_tokenizer())
    assert row["kl_nats"] is None
    assert "token_kl" not in row
