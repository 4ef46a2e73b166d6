"""The study in one command: all arms with all seeds, the measurements of start models and of costs, figures and page.

`python examples/reference_study/study.py` does everything that isn't done yet; `--arm a --seed 0` a single run.
A killed run is resumed from its last checkpoint when the command is given again.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from arms import SEEDS, read_arms
from ingredients import make_inputs
from quickstart_parts import console, headline
from work import Job, run_all

from marl_core.errors import ConfigError, MarlError

FAST: dict[str, Any] = {"ppo.steps": 2, "ppo.batch": 4, "ppo.minibatch": 4, "eval.limit": 4, "eval.every": 0}
RUNS = Path("runs/reference-study")


def main(
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm (repeatable).", show_default=False)] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed (repeatable).", show_default=False)] = None,
    workers: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads of each run.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="Hub name or folder of the base.", show_default=False)] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Two steps of each run, to see that it works.")] = False,
) -> None:
    """Run arms, measure, and write results, figures and page."""
    runs = Path(f"{RUNS}-fast") if fast else RUNS
    try:
        whole = arm is None and seed is None
        tell(runs, arm, seed or list(SEEDS), workers, threads, model, fast, whole)
    except MarlError as error:
        console.print(f"[red]study:[/] {error}", soft_wrap=True)
        raise typer.Exit(error.exit_code) from None


def tell(
    runs: Path,
    names: list[str] | None,
    seeds: list[int],
    workers: int,
    threads: int | None,
    model: str | None,
    fast: bool,
    whole: bool,
) -> None:
    """The study from start to end."""
    arms = read_arms()
    unknown = sorted(set(names or []) - set(arms))
    if unknown:
        raise ConfigError(f"--arm {unknown[0]}: there is no such arm. There are {', '.join(arms)}.")
    inputs = make_inputs(runs, model, fast)
    more = (FAST if fast else {}) | ({"run.threads": threads} if threads else {})
    headline("Arms")
    jobs = []
    for (
        seed
    ) in seeds:  # one seed of every arm first: half a study shows half of the certainty, not half of the questions
        for name in names or arms:
            folder = runs / "arms" / f"{name}-{seed}"
            jobs.append(Job(arms[name], seed, folder, arms[name].config(inputs, seed, folder, more)))
    run_all(jobs, inputs, workers)
    if not whole or fast:
        return
    from costs import measure_costs
    from page import write_page
    from results import collect
    from starts import measure_starts

    headline("Start models")
    measure_starts(runs, inputs)
    headline("Costs of the layouts")
    measure_costs(runs, inputs, threads)
    headline("Results, figures and page")
    collect(runs)
    write_page()


if __name__ == "__main__":
    typer.run(main)
