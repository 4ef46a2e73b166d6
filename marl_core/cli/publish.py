"""`marl publish`: the trained adapter with a model card, in a folder of its own, and on a hub when asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from marl_core.errors import warn


def publish(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of a finished run.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to write; must not exist yet.")],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="NAME", help="The base's hub name OWNER/NAME, for a base in a folder."),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="NAME", help="Upload that folder too, as OWNER/NAME.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="A new hub repository is public; else private.")] = False,
) -> None:
    """Write a run's adapter and a model card into a folder of its own; nothing is uploaded unless asked."""
    from marl_core.report.publish import base_problem, publish_adapter, push

    typer.echo(str(publish_adapter(run, to, hub=push_to_hub, base=base)))
    problem = base_problem(run, base)
    if problem:
        warn(problem)
    if push_to_hub is not None:
        typer.echo(push(to, push_to_hub, public=public))
