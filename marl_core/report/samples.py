"""The table of samples: prompt, response with each token's KL as colour, scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from marl_core.report.charts import COLORS
from marl_core.report.markup import Child, Markup, number, section, tag
from marl_core.report.run_data import RunData

MOST_ROWS = 240
FULL_COLOR = 2.0  # nats: a token whose log-probs differ by this much is fully coloured


def samples_section(runs: Sequence[RunData]) -> Markup | None:
    """All samples, thinned evenly over the run when there are very many; the page sorts and filters them."""
    rows = [row for index, run in enumerate(runs) for row in _rows(index, run, len(runs) > 1)]
    if not rows:
        return None
    heads = [
        tag("th", tag("button", name, type="button", data_sort=key), class_=key)
        for name, key in (("step", "step"), ("prompt and response", "text"), ("score", "score"), ("KL", "kl"))
    ]
    grid = tag("table", tag("thead", tag("tr", heads)), tag("tbody", rows), class_="samples", id="samples-table")
    written = sum(len(run.samples) for run in runs)
    note = (
        f"{len(rows)} of {written} sampled responses. Colour is each token's KL to the reference (log-prob of the policy minus that "
        "of the reference): warm where the policy makes it likelier, cool where less likely; hover for the number, in nats."
    )
    return section("Samples", _controls(runs), tag("div", grid, class_="wide"), note=note)


def _controls(runs: Sequence[RunData]) -> Markup:
    choose = None
    if len(runs) > 1:
        options = [tag("option", "all runs", value="")] + [
            tag("option", run.name, value=index) for index, run in enumerate(runs)
        ]
        choose = tag("select", options, id="samples-run", aria_label="run")
    steps = sorted({line["step"] for run in runs for line in run.samples})
    many = [tag("option", "all steps", value="")] + [tag("option", f"step {step}", value=step) for step in steps]
    find = tag(
        "input", type="search", id="samples-find", placeholder="find in prompts and responses", aria_label="find"
    )
    return tag(
        "div",
        choose,
        tag("select", many, id="samples-step", aria_label="step"),
        find,
        tag("output", id="samples-count"),
        class_="controls",
    )


def _rows(index: int, run: RunData, several: bool) -> list[Markup]:
    lines = list(reversed(run.samples))
    if len(lines) > MOST_ROWS:
        lines = [lines[round(place * (len(lines) - 1) / (MOST_ROWS - 1))] for place in range(MOST_ROWS)]
    return [_row(index, run.name if several else None, line) for line in lines]


def _row(index: int, name: str | None, line: Mapping[str, Any]) -> Markup:
    chip = tag("span", name, class_=f"chip ink-{index % COLORS}") if name else None
    words = [tag("div", _prompt(line["prompt"]), class_="prompt"), tag("div", response(line), class_="response")]
    ending = None if line.get("finished", True) else tag("span", "cut at the limit", class_="cut")
    parts = line.get("parts") or {}
    each = [tag("div", tag("span", source), " ", number(score), class_="part") for source, score in parts.items()]
    return tag(
        "tr",
        tag("td", number(line["step"]), chip, class_="step"),
        tag("td", words, ending),
        tag("td", tag("b", number(line["score"])), each if len(parts) > 1 else None, class_="score"),
        tag("td", number(line.get("kl_nats")), class_="kl"),
        data_run=index,
        data_step=line["step"],
        data_score=line["score"],
        data_kl=line.get("kl_nats"),
    )


def _prompt(prompt: Any) -> Child:
    """A text, or chat messages with their roles."""
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        return [
            tag("div", tag("span", message.get("role", ""), class_="role"), " ", _content(message.get("content", "")))
            for message in prompt
        ]
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _content(content: Any) -> str:
    """A message's text; of a list of parts the texts, and the kind of any other part."""
    if not isinstance(content, list):
        return str(content)
    parts = [part if isinstance(part, dict) else {"text": part} for part in content]
    return " ".join(str(part.get("text", f"[{part.get('type', 'part')}]")) for part in parts)


def response(line: Mapping[str, Any]) -> Child:
    """The response in spans of one token each, where the run wrote where tokens end and their KL."""
    text, ends, kl = str(line["response"]), line.get("token_ends"), line.get("token_kl")
    if not ends or not kl or len(ends) != len(kl):
        return text
    starts = [0, *ends[:-1]]
    pieces: list[Child] = []
    for start, end, nats in zip(starts, ends, kl, strict=True):
        shown = text[start:end] or ("⏎" if start == end == ends[-1] and line.get("finished") else "")
        if shown:
            pieces.append(_token(shown, float(nats), special=start == end))
    return [*pieces, text[ends[-1] :]]


def _token(text: str, nats: float, special: bool) -> Markup:
    share = min(1.0, abs(nats) / FULL_COLOR)
    kind = "warm" if nats > 0 else "cool"
    strong = f"--k:{share:.2f}" if share >= 0.005 else None
    return tag("span", text, class_=f"t {kind}{' end' if special else ''}", style=strong, title=f"{nats:+.3f} nats")
