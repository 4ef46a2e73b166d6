"""docs/reference-policies.md, made from page.md.j2 and `results/`: no number of the page is typed by hand."""

from collections.abc import Sequence
from typing import Any

from arms import HERE, SEEDS, read_arms
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from results import Results, Spread

PAGE = HERE.parent.parent / "docs" / "reference-policies.md"
DIGITS = {
    "reward": 2,
    "kl": 2,
    "kl_sft": 2,
    "kl_raw": 2,
    "vader": 3,
    "vader_positive": 2,
    "perplexity": 1,
    "distinct": 2,
    "entropy": 2,
    "clipfrac": 3,
    "explained_var": 2,
}
HEADERS = {
    "reward": "reward",
    "kl": "KL to own reference",
    "kl_sft": "KL to SFT",
    "kl_raw": "KL to raw base",
    "vader": "VADER",
    "vader_positive": "share positive",
    "perplexity": "perplexity under SFT",
    "distinct": "trigrams of one's own",
    "entropy": "entropy",
    "clipfrac": "clip fraction",
    "explained_var": "explained variance",
}
LATE = ("entropy", "clipfrac", "explained_var")  # numbers of training, not of evaluation


def write_page(results: Results | None = None) -> None:
    """Draw the figures and write the page."""
    from figures import draw_all

    results = results or Results()
    draw_all(results)
    PAGE.write_text(render(results), encoding="utf-8")


def render(results: Results) -> str:
    """The page's text."""
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip  # markdown, from our own files
    tell = Telling(results)
    return environment.get_template("page.md.j2").render(r=results, t=tell, arms=read_arms(), seeds=SEEDS)


class Telling:
    """Numbers as text."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def table(self, arms: Sequence[str], metrics: Sequence[str], step: int | None = None) -> str:
        """One line an arm: mean and standard deviation over seeds, held out, at the end of training (or after `step`)."""
        titles = read_arms()
        head = ["arm", "", *(HEADERS[metric] for metric in metrics)]
        rows = [
            [f"`{arm}`", titles[arm].title, *(self.value(arm, metric, step) for metric in metrics)]
            for arm in arms
            if arm in self.results.arms()
        ]
        return markdown(head, rows)

    def value(self, arm: str, metric: str, step: int | None = None) -> str:
        """One number with its spread."""
        if metric in LATE and not self.results.curve(arm, metric):
            return "-"  # nothing of the kind: no value function
        spread = self.results.late(arm, metric) if metric in LATE else self.results.at(arm, metric, step)
        return shown(spread, DIGITS[metric])

    def mean(self, arm: str, metric: str, step: int | None = None, digits: int | None = None) -> str:
        """One number without its spread."""
        spread = self.results.late(arm, metric) if metric in LATE else self.results.at(arm, metric, step)
        return f"{spread.mean:.{DIGITS[metric] if digits is None else digits}f}"

    def gap(self, one: str, two: str, metric: str) -> str:
        """The difference of two arms, in words: with the seeds' own noise beside it."""
        a, b = self.results.at(one, metric), self.results.at(two, metric)
        digits = DIGITS[metric]
        if a.std is None or b.std is None:
            return f"{a.mean - b.mean:+.{digits}f} (one seed only)"
        noise = (a.std**2 / a.count + b.std**2 / b.count) ** 0.5
        return f"{a.mean - b.mean:+.{digits}f} (standard error of the difference {noise:.{digits}f})"

    def layouts(self, arms: Sequence[str]) -> str:
        """Memory and CPU seconds of the layouts."""
        found = {row["arm"]: row for row in self.results.layouts}
        titles = read_arms()
        rows = [
            [
                f"`{arm}`",
                titles[arm].title,
                f"{found[arm]['peak_rss_mib']:,}",
                f"{found[arm]['cpu_seconds_per_step']:.2f}",
            ]
            for arm in arms
        ]
        return markdown(["arm", "", "peak memory, MiB", "CPU seconds a step"], rows)

    def start(self, base: str, start: str, key: str) -> Any:
        """One number of the start models."""
        return next(row[key] for row in self.results.starts if row["base"] == base and row["start"] == start)

    def starts(self, bases: Sequence[str], kinds: Sequence[str]) -> str:
        """Start models against the exact one."""
        rows = [
            [row["start"], row["base"], f"{row['kl_per_token']:.2g}", f"{row['largest_logprob_gap']:.2g}",
             f"{row['same_first_choice']:.3f}", f"{row['perplexity']:.1f}"]
            for base in bases for kind in kinds for row in self.results.starts
            if row["base"] == base and row["start"] == kind
        ]  # fmt: skip
        head = ["start model", "base", "KL from the exact model, nats per token", "largest log-prob gap"]
        return markdown([*head, "same first choice", "perplexity"], rows)

    def samples(self, arm: str, count: int = 4) -> str:
        """The last evaluation's first texts, seed 0."""
        last = self.results.last(arm)
        mine = [s for s in self.results.samples if s["arm"] == arm and s["step"] == last][:count]
        return markdown(
            ["opening", "continuation", "reward"],
            [[s["prompt"], s["response"].strip(), f"{s['score']:+.1f}"] for s in mine],
        )

    def plain(self, number: float) -> str:
        """A small number as people write it."""
        return f"{number:g}"

    def versions(self) -> str:
        """The libraries that made the numbers."""
        return ", ".join(f"{name} {number}" for name, number in self.results.machine["versions"].items())

    def times(self, one: str, two: str) -> str:
        """How often the second layout's CPU seconds a step go into the first's."""
        seconds = {row["arm"]: row["cpu_seconds_per_step"] for row in self.results.layouts}
        return f"{seconds[one] / seconds[two]:.1f} times"

    def hours(self) -> str:
        """CPU time of all runs together."""
        return f"{sum(row['cpu_seconds'] for row in self.results.costs) / 3600:.1f}"

    def minutes(self) -> str:
        """Median CPU time of one run."""
        ordered = sorted(row["cpu_seconds"] for row in self.results.costs)
        return f"{ordered[len(ordered) // 2] / 60:.1f}"


def shown(spread: Spread, digits: int) -> str:
    """Mean and standard deviation."""
    return f"{spread.mean:.{digits}f}" + (f" ± {spread.std:.{digits}f}" if spread.std is not None else "")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(str(cell).replace("|", r"\|").split()) for cell in line) + " |" for line in lines
    )


if __name__ == "__main__":
    write_page()
