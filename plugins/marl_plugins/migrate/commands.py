"""Carry a PPO config of another trainer over to marl: `marl import llamafactory FILE`, `marl import trl-args ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from marl_plugins.migrate import llamafactory, trl
from marl_plugins.writing import MODELINE, render, write

app = typer.Typer(
    help="Carry a PPO config of another trainer over to marl.", no_args_is_help=True, rich_markup_mode=None
)
To = Annotated[Path | None, typer.Option("--to", help="File to write; printed when absent.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the file.")]

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
    file: Annotated[Path, typer.Argument(metavar="FILE", help="LLaMA-Factory's YAML (stage: ppo).")],
    to: To = None,
    force: Force = False,
) -> None:
    """Carry over a PPO config of LLaMA-Factory."""
    _finish(*llamafactory.migrate(trl.read_mapping(file)), f"Carried over from {file.name} (LLaMA-Factory).", to, force)


@app.command("trl-args", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def trl_args(context: typer.Context, to: To = None, force: Force = False) -> None:
    """Carry over the arguments of a TRL PPO script, written as they are: --learning_rate 1e-5 --use_peft ..."""
    _finish(
        *trl.migrate(trl.read_arguments(context.args)),
        "Carried over from the arguments of a TRL PPO script.",
        to,
        force,
    )


def _finish(config: dict[str, Any], refused: list[tuple[str, str]], origin: str, to: Path | None, force: bool) -> None:
    """The config to the file or to stdout; what was not carried over as comments in it, and to stderr."""
    lines = [f"{key}: {why}" for key, why in refused]
    text = render(config, SECTION_COMMENTS, [MODELINE.removeprefix("# "), origin])
    if lines:
        text += "\n# Not carried over, or not as it was:\n" + "".join(f"#   {line}\n" for line in lines)
    if write(text, to, force):
        typer.echo(f"{to}: written. Next: marl check {to}")
    else:
        typer.echo(text, nl=False)
    for line in lines:
        typer.echo(f"not carried over: {line}", err=True)
