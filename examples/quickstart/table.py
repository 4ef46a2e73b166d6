"""The before/after table of a run with held-out evaluations: on the screen and as `table.md`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from marl_core.errors import DataError

Evaluation = dict[str, Any]


def judge(name: str) -> Callable[[Evaluation], tuple[float, float | None]]:
    """Read mean and spread of one judge."""
    return lambda line: (line["judges"][name]["mean"], line["judges"][name]["std"])


# Label, number format, and where mean and standard deviation over sampling seeds are found.
ROWS: list[tuple[str, str, Callable[[Evaluation], tuple[float, float | None]]]] = [
    ("reward adapter's score", "{:.2f}", lambda line: (line["reward"], line["reward_std"])),
    ("VADER compound (never trained on)", "{:.3f}", judge("vader")),
    ("share VADER calls positive", "{:.3f}", judge("vader_positive")),
    ("KL to the reference, nats per text", "{:.2f}", lambda line: (line["kl"], line.get("kl_std"))),
    ("mean length, tokens", "{:.1f}", lambda line: (line["length"], line.get("length_std"))),
]
MUST_RISE = 3  # the first three rows


def read_evaluations(file: Path) -> list[Evaluation]:
    """All evaluations of a run, the one before training first."""
    if not file.is_file():
        raise DataError(f"There is no {file}, so nothing can be compared. Let the run finish first.")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < 2:
        raise DataError(f"{file} holds {len(lines)} evaluation(s), a comparison needs two. Let the run finish first.")
    return lines


def comparison(before: Evaluation, after: Evaluation) -> list[list[str]]:
    """Rows of label, before, after, change: each mean +- standard deviation over sampling seeds."""

    def shown(pattern: str, mean: float, spread: float | None) -> str:
        return pattern.format(mean) + (f" ± {pattern.format(spread)}" if spread is not None else "")

    rows = []
    for label, pattern, read in ROWS:
        (old, old_spread), (new, new_spread) = read(before), read(after)
        change = pattern.replace(":", ":+").format(new - old)
        rows.append([label, shown(pattern, old, old_spread), shown(pattern, new, new_spread), change])
    return rows


def verdict(before: Evaluation, after: Evaluation) -> str:
    """Whether reward and judge rose by more than their spread over sampling seeds, in one sentence."""
    failed = []
    for label, _, read in ROWS[:MUST_RISE]:
        (old, old_spread), (new, new_spread) = read(before), read(after)
        if new - old <= (old_spread or 0.0) + (new_spread or 0.0):
            failed.append(label)
    if failed:
        return f"Not shown: {', '.join(failed)} did not rise by more than the spread over sampling seeds."
    return "Reward and independent judge both rose by more than the spread over sampling seeds."


def continuations(before: Evaluation, after: Evaluation, count: int = 3) -> list[list[str]]:
    """Rows of opening, continuation before, continuation after, for openings that both evaluations kept."""
    later = {sample["prompt"]: sample for sample in after["samples"]}
    both = [(sample, later[sample["prompt"]]) for sample in before["samples"] if sample["prompt"] in later]
    return [
        [old["prompt"], *(f"{one['response'].strip()} ({one['score']:+.1f})" for one in (old, new))]
        for old, new in both[:count]
    ]


def show(run: Path, console: Console) -> None:
    """Print the tables and write them to `table.md` in the run folder."""
    lines = read_evaluations(run / "evals.jsonl")
    before, after = lines[0], lines[-1]
    tables = [
        (
            ["on held-out openings", f"before (step {before['step']})", f"after (step {after['step']})", "change"],
            comparison(before, after),
        ),
        (["opening", "continuation before (score)", "continuation after (score)"], continuations(before, after)),
    ]
    for header, rows in tables:
        table = Table(*header, show_lines=header[0] == "opening")
        for row in rows:
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        console.print(table)
    sentence = verdict(before, after)
    console.print(sentence)
    text = "\n".join([*(markdown(header, rows) for header, rows in tables), sentence, ""])
    (run / "table.md").write_text(text, encoding="utf-8")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table in markdown."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[" ".join(cell.replace("|", r"\|").split()) for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


if __name__ == "__main__":
    show(Path(sys.argv[1]), Console())
