"""docs/adapter-study.md, made from page.md.j2 and `results/`: no number of the page is typed by hand, and no verdict either."""

import math
import statistics
from collections.abc import Sequence

import frontiers
import protocol
from answers import Difference, Noise, rank_correlation
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from kinds import HERE, read_kinds, read_study, read_tasks
from measured import Measured, Row

PAGE = HERE.parent.parent / "docs" / "adapter-study.md"
BUDGETS = (1_000, 10_000, 100_000, math.inf)  # learned numbers, at most
LORAS = ("lora-1", "lora-4", "lora-16", "lora-64")
SVD = "pissa"
TIMES, NEAR = 10, 1.5  # what is asked of full fine-tuning's rate, and how far from it is near
FEW, MANY = 1 / 3, 2 / 3  # of an explained spread, where the words change


def write_page(measured: Measured | None = None) -> None:
    """Draw the figures and write the page."""
    measured = measured or Measured()
    frontiers.draw_all(measured)
    PAGE.write_text(render(measured), encoding="utf-8")


def render(measured: Measured) -> str:
    """The page's text."""
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip  # markdown, from our own files
    tasks = {name: TaskTold(measured, name) for name in measured.tasks()}
    return environment.get_template("page.md.j2").render(
        m=measured, tasks=tasks, protocol=protocol, study=read_study(), kinds=read_kinds(), hours=hours(measured),
        versions=", ".join(f"{name} {number}" for name, number in measured.machine["versions"].items()),
        whole=all(task.whole for task in tasks.values()) and set(tasks) == set(read_tasks()), figures=frontiers,
    )  # fmt: skip


class TaskTold:
    """What was measured on one task, as text."""

    def __init__(self, measured: Measured, name: str) -> None:
        self.measured, self.name, self.task = measured, name, read_tasks()[name]
        self.kinds = measured.kinds(name)
        self.scores = {kind: measured.scores(name, kind) for kind in self.kinds}
        self.noise = Noise.of(list(self.scores.values()))
        self.learned = {kind: measured.best_runs(name, kind)[0]["learned"] for kind in self.kinds}
        self.ones = {kind: row for kind in self.kinds if (row := measured.at_one_rate(name, kind))}

    @property
    def whole(self) -> bool:
        """Whether every kind was run with every seed, and at the one rate."""
        everybody = set(read_kinds())
        seeds = all(len(scores) == len(protocol.SEEDS) for scores in self.scores.values())
        return set(self.kinds) == everybody and seeds and set(self.ones) == everybody

    def beside(self, kind: str, other: str = protocol.YARDSTICK, comparisons: int | None = None) -> Difference:
        """How a kind's score differs from another's, as one of all comparisons with that one."""
        count = len(self.kinds) - 1 if comparisons is None else comparisons
        return Difference.of(self.scores[kind], self.scores[other], self.noise, max(1, count))

    def table(self) -> str:
        """One line a kind, at its best rate."""
        judges = list(self.task.config["eval"].get("judges", {}))
        head = ["kind", "numbers learned", "rate", "first step", self.task.answer, f"less {protocol.YARDSTICK}", "KL"]
        rows = []
        for kind in self.kinds:
            runs, size = self.measured.best_runs(self.name, kind), self.measured.best_size(self.name, kind)
            last = [self._counted(row) for row in runs]
            other = "" if kind == protocol.YARDSTICK else self.beside(kind).told()
            rows.append(
                [read_kinds()[kind].title, f"{self.learned[kind]:,}", f"{runs[0]['rate']:.2g}", size]
                + [spread(self.scores[kind]), other, spread([row["kl"] for row in last], 2)]
                + [spread([row[judge] for row in last]) for judge in judges]
                + [f"{statistics.fmean(row['cpu_seconds'] for row in runs):.0f}"]
                + [f"{statistics.fmean(row['peak_mib'] for row in runs):.0f}"]
            )
        return markdown([*head, *judges, "seconds", "peak MiB"], rows)

    def probes(self) -> str:
        """One line a kind: how far a step goes, and what came of each size."""
        head = ["kind", f"first step at {protocol.FIRST_RATE:g}, nats a token", f"times {protocol.YARDSTICK}'s"]
        head += [f"{size}: rate" for size in protocol.SIZES] + [
            f"{size}: {self.task.answer}" for size in protocol.SIZES
        ]
        yardstick = self.measured.probes[self.name, protocol.YARDSTICK]["at_first_rate"]
        rows = []
        for kind in self.kinds:
            probe, runs = self.measured.probes[self.name, kind], self.measured.by_size(self.name, kind)
            rows.append(
                [
                    read_kinds()[kind].title,
                    f"{probe['at_first_rate']:.2g}",
                    f"{probe['at_first_rate'] / yardstick:.2g}x",
                ]
                + [f"{runs[size]['rate']:.2g}" for size in protocol.SIZES]
                + [f"{self.measured.score(runs[size]):.3f}{self._mark(runs[size])}" for size in protocol.SIZES]
            )
        return markdown(
            [*head, f"{self.task.answer} at one rate"],
            [[*row, self._one(kind)] for row, kind in zip(rows, self.kinds, strict=True)],
        )

    # -- the questions ------------------------------------------------------------------------------------

    def budgets(self) -> str:
        """The best kind within each budget of learned numbers, and the smallest that isn't told apart from the best."""
        rows = []
        for budget in BUDGETS:
            within = [kind for kind in self.kinds if self.learned[kind] <= budget]
            if within:
                best = max(within, key=self._mean)
                name = "no limit" if budget == math.inf else f"{budget:,}"
                told = "" if best == protocol.YARDSTICK else self.beside(best).verdict()
                rows.append(
                    [name, read_kinds()[best].title, f"{self.learned[best]:,}", spread(self.scores[best]), told]
                )
        return markdown(
            ["numbers learned, at most", "best", "it learns", self.task.answer, f"beside {protocol.YARDSTICK}"], rows
        )

    def smallest(self) -> str:
        """The kind with the fewest numbers that isn't measurably worse than the best of all."""
        best = max(self.kinds, key=self._mean)
        enough = [kind for kind in self.kinds if kind == best or not self.beside(kind, best).seen]
        least = min(enough, key=lambda kind: self.learned[kind])
        return (
            f"The best mean is {title(best)}'s; {len(enough) - 1} of the other {len(self.kinds) - 1} kinds can't be told apart from it. "
            f"Of those and itself {title(least)} learns the fewest numbers, {self.learned[least]:,}."
        )

    def ranks(self) -> str:
        """Does rank matter?"""
        there = [kind for kind in LORAS if kind in self.kinds]
        if len(there) < 2:
            return "Not measured."
        low, high = min(there, key=self._mean), max(there, key=self._mean)
        found = self.beside(high, low, comparisons=len(there) * (len(there) - 1) // 2)
        told = f"{title(high)} less {title(low)}, the largest difference of two ranks, is {found.told()}"
        middles = [self.measured.by_size(self.name, kind)["middle"]["rate"] for kind in there]
        times = f"{max(middles) / min(middles):.1f}"
        return (
            f"{yes_or_no(found)}: {told}. "
            f"For middle steps the highest rate of the {len(there)} ranks is {times} times the lowest, at the same alpha."
        )

    def svd(self) -> str:
        """Do starts from the singular value decomposition collapse?"""
        if SVD not in self.kinds:
            return "Not measured."
        mine, others = self._collapsed(SVD), self._collapsed(protocol.YARDSTICK)
        told = [
            f"{f'Its {words(mine)} steps collapse' if mine else 'No size of step makes it collapse'} "
            f"({protocol.YARDSTICK}: {words(others) or 'none'}).",
            f"At its best rate, beside {protocol.YARDSTICK}: {self.beside(SVD).verdict()}.",
        ]
        if one := self.ones.get(SVD):
            ends = "collapses" if self.measured.collapsed(one) else "does not collapse"
            far = ", but ends beyond the bound" if self.measured.fate(one) == "too far" else ""
            told.append(
                f"At {protocol.YARDSTICK}'s best rate, where its first step is {self._step_ratio(SVD)} times as large, it {ends}{far} "
                f"({self.task.answer} {self.measured.score(one):.3f} at its last evaluation within it)."
            )
        return " ".join(told)

    def artefact(self) -> str:
        """How much of a ranking at one rate is the size of a step?"""
        if len(self.ones) < 3:
            return "Not measured."
        sizes = {kind: self.measured.best_size(self.name, kind) for kind in self.ones}
        runs = {kind: self.measured.by_size(self.name, kind)[size] for kind, size in sizes.items()}
        one = {kind: self.measured.score(row) for kind, row in self.ones.items()}
        best = {kind: self.measured.score(row) for kind, row in runs.items()}
        yardstick = self.measured.probes[self.name, protocol.YARDSTICK]["at_first_rate"]
        apart = {
            kind: abs(math.log(self.measured.probes[self.name, kind]["at_first_rate"] / yardstick)) for kind in one
        }
        at_one, at_best = statistics.stdev(one.values()), statistics.stdev(best.values())
        share = 1 - (at_best / at_one) ** 2 if at_one else 0.0
        by_step = rank_correlation({kind: (one[kind], apart[kind]) for kind in one})
        same = rank_correlation({kind: (one[kind], best[kind]) for kind in one})
        told = "Mostly not" if share >= MANY else "In part" if share >= FEW else "Mostly yes"
        return (
            f"{told}. At one rate the kinds' standard deviation is {at_one:.3f}, each at its best rate {at_best:.3f}: "
            f"{max(0.0, share):.0%} of the variance goes away with the one rate. "
            f"The order at one rate has a rank correlation of {by_step:.2f} with how many times larger or smaller "
            f"a kind's first step is than {protocol.YARDSTICK}'s, and of {same:.2f} with the order at best rates (all of seed 0)."
        )

    def ten_times(self) -> str:
        """Is ten times full fine-tuning's rate right?"""
        rows = [row for row in self.measured.full if row["task"] == self.name]
        if not rows:
            return "Not measured."
        factors = {way: equal_steps(rows, way, protocol.YARDSTICK) for way in ("all weights", "linear layers")}
        told = ", ".join(f"{span(found)} times where {way} learn" for way, found in factors.items())
        low, high = min(map(min, factors.values())), max(map(max, factors.values()))
        near = high >= TIMES / NEAR and low <= TIMES * NEAR
        verdict = "about right" if near else "too much" if high < TIMES else "too little"
        return (
            f"{title(protocol.YARDSTICK)} takes as large a first step as full fine-tuning at {told}. "
            f"For a step of equal size ten is {verdict}."
        )

    def full_table(self) -> str:
        """First steps of all weights and of LoRA at ten times the rate."""
        rows = [row for row in self.measured.full if row["task"] == self.name]
        ways = list(dict.fromkeys(row["way"] for row in rows))
        rates = list(dict.fromkeys(row["rate"] for row in rows if not row["way"].startswith("lora")))
        by = {way: [row["size"] for row in rows if row["way"] == way] for way in ways}
        head = [
            "rate of full fine-tuning",
            *(f"{way}{' at ten times' if way.startswith('lora') else ''}" for way in ways),
        ]
        return markdown(
            head, [[f"{rate:g}", *(f"{by[way][place]:.2g}" for way in ways)] for place, rate in enumerate(rates)]
        )

    def _mean(self, kind: str) -> float:
        return statistics.fmean(self.scores[kind])

    def _counted(self, row: Row) -> Row:
        """The evaluation that counts."""
        found: Row = [one for one in row["evals"] if one["kl"] <= self.task.bound][-1]
        return found

    def _mark(self, row: Row) -> str:
        fate = self.measured.fate(row)
        return f" ({fate})" if fate else ""

    def _one(self, kind: str) -> str:
        row = self.ones.get(kind)
        return "" if row is None else f"{self.measured.score(row):.3f}{self._mark(row)}"

    def _collapsed(self, kind: str) -> list[str]:
        return [size for size, row in self.measured.by_size(self.name, kind).items() if self.measured.collapsed(row)]

    def _step_ratio(self, kind: str) -> str:
        mine, other = (self.measured.probes[self.name, one]["at_first_rate"] for one in (kind, protocol.YARDSTICK))
        return f"{mine / other:.1f}"


def equal_steps(rows: Sequence[Row], way: str, lora: str) -> list[float]:
    """At each rate of full fine-tuning: how many times that rate LoRA's is, where its first step is as large."""
    full = [row for row in rows if row["way"] == way]
    small = [row for row in rows if row["way"] == lora]
    return [one["size"] / (other["size"] / other["rate"]) / one["rate"] for one, other in zip(full, small, strict=True)]


def span(values: Sequence[float]) -> str:
    """From the least to the largest."""
    low, high = (f"{value:.2g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation."""
    told = f"{statistics.fmean(values):.{digits}f}"
    return told if len(values) < 2 else f"{told} ± {statistics.stdev(values):.{digits}f}"


def title(kind: str) -> str:
    """A kind's name in sentences."""
    return read_kinds()[kind].title


def yes_or_no(difference: Difference) -> str:
    """Whether a difference is to be seen."""
    if math.isnan(difference.margin):
        return "Not known from one seed"
    return "Yes" if difference.seen else "No difference"


def words(names: Sequence[str]) -> str:
    """Names with "and"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def hours(measured: Measured) -> str:
    """Processor time of everything."""
    return f"{measured.machine['cpu_seconds'] / 3600:.1f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    write_page()
