"""The study in one command: bases, probes, runs, the step of full fine-tuning, figures and page.

`python examples/adapter_study/study.py --workers 2` does everything that isn't done yet; `--only 'reviews/dora/*'` some pieces of it. What
was stopped or killed goes on when the command is given again. All kinds come before the second seed and the second task, so that half of
the study shows half of the certainty and not half of the kinds.
"""

from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import typer
from pieces import do_all
from plan import FAST, FULL, Study
from rich.console import Console

from marl_core.errors import MarlError

console = Console(highlight=False)
RUNS = Path("runs/adapter-study")


def main(
    only: Annotated[list[str] | None, typer.Option(help="Pieces whose name fits this pattern (repeatable).")] = None,
    workers: Annotated[int, typer.Option(help="Pieces at a time, one thread each.")] = 1,
    fast: Annotated[bool, typer.Option("--fast", help="Two steps of each run, to see that it works.")] = False,
    pieces: Annotated[
        bool, typer.Option("--pieces", help="Only say which pieces there are, and which are done.")
    ] = False,
) -> None:
    """Run what isn't done, and write results, figures and page."""
    study = Study(Path(f"{RUNS}-fast") if fast else RUNS, FAST if fast else FULL)
    try:
        for title, stage in study.stages():
            chosen = [one for one in stage() if only is None or any(fnmatch(one.name, pattern) for pattern in only)]
            if pieces:
                for one in chosen:
                    console.print(f"{'done' if one.finished else 'open'}  {one.name}", markup=False)
            elif chosen:
                console.rule(title, align="left")
                do_all(chosen, workers, console.print)
        if not fast and not pieces:
            from kinds_page import write_page
            from measured import collect

            collect(study)
            write_page()
    except MarlError as error:
        console.print(f"[red]study:[/] {error}", soft_wrap=True)
        raise typer.Exit(error.exit_code) from None


if __name__ == "__main__":
    typer.run(main)
