"""Configs as commented YAML text: one line a section, a sentence of explanation above it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import typer
import yaml

from marl_core import ConfigError, RunConfig
from marl_plugins.adapter.lora import Lora

SCHEMA_FILE = "marl.schema.json"
MODELINE = f"# yaml-language-server: $schema={SCHEMA_FILE}"


def render(config: Mapping[str, Any], about: Mapping[str, str], head: Iterable[str] = ()) -> str:
    """The config's sections in their order, each with its comment; `head` are comment lines at the top."""
    lines = [f"# {line}".rstrip() for line in head]
    for name, section in config.items():
        lines += ["", *(f"# {line}" for line in about.get(name, "").splitlines()), _dump(name, section)]
    return "\n".join(lines).lstrip("\n") + "\n"


def one_line(text: str) -> str:
    """A text as it may stand in a comment, of YAML or of Python: on one line, without signs that can't be printed."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


class _Dumper(yaml.SafeDumper):
    """Texts of several lines stand on one, as `"{instruction}\\n{input}"`: a fold would hide the newline."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None),
)


def _dump(name: str, section: Any) -> str:
    flow = None if isinstance(section, Mapping | list) else False
    text = yaml.dump(
        {name: section}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=flow
    )
    return str(text).rstrip().replace("{'on': ", "{on: ")  # a key, not a truth value: marl reads YAML so


def usual_config() -> RunConfig:
    """A config with nothing but what every run must name: its values are marl's defaults, and stand nowhere twice."""
    reward = {"use": "function", "target": "rewards.py:score"}
    return RunConfig.model_validate({"model": {"path": "-"}, "reference": "disabled-adapter", "reward": reward})


def usual_lora() -> dict[str, Any]:
    """A new LoRA as section policy, with the values of marl's own that a reader wants to see."""
    usual = Lora()
    return {"start": "new", "r": usual.r, "alpha": usual.alpha, "targets": usual_config().policy.targets}


def write_all(texts: Mapping[Path, str], force: bool = False) -> None:
    """Write new files: all of them, or none where one is there already. ConfigError names it."""
    for file in texts:
        if file.exists() and not force:
            raise ConfigError(f"{file}: there is such a file already. Give another name, or --force to overwrite it.")
    for file, text in texts.items():
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{file}: can't be written: {error.strerror or error}. Give another name.") from error


def write_schema(context: typer.Context, folder: Path) -> None:
    """The schema that a config's first line names, as `marl schema` prints it; one that is there already stays, and that is said."""
    file = folder / SCHEMA_FILE
    printed = io.StringIO()
    with redirect_stdout(printed):
        run_command(context, "schema")
    if not file.exists():
        write_all({file: printed.getvalue()})
        typer.echo(f"{file}: written, for completion in an editor")
    elif file.read_text(encoding="utf-8", errors="replace") != printed.getvalue():
        typer.echo(f"{file}: is there already and differs; it stays as it is. To renew it: marl schema > {file}")


def run_command(context: typer.Context, *words: str) -> None:
    """Another command of marl's, in this process: its errors are raised."""
    context.find_root().command.main(list(words), prog_name="marl", standalone_mode=False)
