"""Convert a PPO config of another trainer to marl's: `marl import llamafactory FILE`, `marl import trl-args SCRIPT ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from marl_plugins.migrate import llamafactory, trl
from marl_plugins.migrate.foreign_config import MISSING, Carried
from marl_plugins.migrate.foreign_files import read_mapping
from marl_plugins.writing import MODELINE, one_line, render, write_all, write_schema

app = typer.Typer(
    help="Convert a PPO config of another trainer to marl's.", no_args_is_help=True, rich_markup_mode=None
)
To = Annotated[Path | None, typer.Option("--to", help="File to write; printed when absent.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the file.")]

REFUSED = "Not converted:"
PARTLY = "Converted in part, or changed:"
ASSUMED = "Assumed, because it was not given. Compare it with what you ran:"
HINT = "scripts often set inside what is assumed here: look there, or give marl the script itself: marl import trl-args SCRIPT.py ..."
SECTION_COMMENTS = {
    "model": "The one base that policy, reference, reward and value share.",
    "policy": "The trained adapter.",
    "reference": "Which weights the KL penalty pulls towards; measured before the first update.",
    "reward": "What scores a response.",
    "value": "The value function.",
    "data": "The training prompts.",
    "ppo": "batch = responses a step, minibatch = responses an optimizer step, microbatch = responses a forward pass.",
}


@app.command("llamafactory")
def llamafactory_command(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="LLaMA-Factory's YAML (stage: ppo).")],
    to: To = None,
    force: Force = False,
    processes: Annotated[
        int | None,
        typer.Option(
            "--num-processes",
            min=1,
            help="How many processes (GPUs) the run had; LLaMA-Factory's batch is that of one.",
        ),
    ] = None,
) -> None:
    """Convert a PPO config of LLaMA-Factory."""
    carried = llamafactory.migrate(read_mapping(file), processes)
    _finish(context, carried, f"Converted from {file.name} (LLaMA-Factory).", to, force)


@app.command("trl-args", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def trl_args(
    context: typer.Context,
    to: To = None,
    force: Force = False,
    trl_version: Annotated[
        str | None,
        typer.Option(
            "--trl-version",
            help="Release of TRL that the script is for, whose defaults count; else the installed one, or the newest that fits.",
        ),
    ] = None,
) -> None:
    """Convert a TRL PPO script with its arguments, written as you start it: accelerate launch --num_processes 4 ppo.py --learning_rate 1e-5
    ..., ppo.py --learning_rate 1e-5 ..., or the arguments alone."""
    command = trl.split_command(context.args)
    script = command.script
    carried = trl.migrate(trl.read_arguments(command.words), script, trl_version, command.processes)
    origin = f"{script.name} (TRL) and its arguments" if script else "the arguments of a TRL PPO script"
    _finish(context, carried, f"Converted from {origin}.", to, force)
    if carried.assumed and script is None:
        typer.echo(HINT, err=True)


def _finish(context: typer.Context, carried: Carried, origin: str, to: Path | None, force: bool) -> None:
    """The config to the file or to stdout; what was not converted, and what was assumed, as comments in it and to stderr."""
    refused = [f"{key}: {why}" for key, why in carried.refused if key not in carried.partly]
    partly = [f"{key}: {why}" for key, why in carried.refused if key in carried.partly]
    assumed = [f"{key}: {why}" for key, why in carried.assumed]
    text = render(carried.config, SECTION_COMMENTS, [MODELINE.removeprefix("# "), one_line(origin)])
    for title, lines in ((REFUSED, refused), (PARTLY, partly), (ASSUMED, assumed)):
        text += f"\n# {title}\n" + "".join(f"#   {one_line(line)}\n" for line in lines) if lines else ""
    if to is not None:
        write_all({to: text} | {to.parent / name: content for name, content in carried.files.items()}, force)
    for word, lines in (("not converted", refused), ("partly", partly), ("assumed", assumed)):
        for line in lines:
            key, _, why = line.partition(": ")
            typer.echo(
                f"missing: {key}: {why.removeprefix(MISSING)}" if why.startswith(MISSING) else f"{word}: {line}",
                err=True,
            )
    if to is None:
        typer.echo(text, nl=False)
        for name in carried.files:
            typer.echo(f"{name}: is written beside the config when it has a file (--to)", err=True)
    else:
        for name in carried.files:
            typer.echo(f"{to.parent / name}: written")
        write_schema(context, to.parent)
        typer.echo(f"{to}: written. Next: marl check {to}")
