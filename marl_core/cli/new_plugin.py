"""`marl new-plugin`: an installable package with one strategy, its entry point, its tests and a README."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from marl_core.errors import ConfigError
from marl_core.registry.families import FAMILIES, Family, Key, family_named

PREFIX = "marl-"
RESERVED_NAMES = ("core", "plugins")  # their modules would be ours
TEMPLATES = "plugin_template"


def new_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What configs will call the strategy, e.g. politeness.")],
    family: Annotated[str, typer.Option("--family", metavar="|".join(FAMILIES), help="What kind of choice it is.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Folder to write; default: marl-NAME.")
    ] = None,
) -> None:
    """Write a package with a strategy of one's own: code, entry point, tests, README."""
    kind = family_named(family)
    plain = _plain(name, kind)
    folder = out or Path(PREFIX + plain)
    written = write_plugin(plain, kind, folder)
    typer.echo("\n".join(str(file) for file in written))
    typer.echo(
        f"\nInstall and test it:\n  pip install -e '{folder}[test]'\n  python -m pytest {folder}\n"
        f"Then a config may say:\n  {_fill('$use', plain, kind)}"
    )


def write_plugin(name: str, family: Family, folder: Path) -> list[Path]:
    """Write the package for strategy `name` into `folder`, which must be new or empty; the files written."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"--out: {folder} exists and isn't empty; give a new folder, nothing is overwritten.")
    module = _module(name)
    contents = {
        "pyproject.toml": _template("pyproject.toml"),
        "README.md": _template("README.md"),
        f"{module}.py": _template(f"{family.name}.py"),
        f"tests/test_{module}.py": _template("test.py") + _template(f"test_{family.name}.py"),
    }
    written = []
    try:
        for path, text in contents.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(_fill(text, name, family), encoding="utf-8")
            written.append(file)
    except OSError as error:
        raise ConfigError(f"--out: {folder} can't be written ({error}). Give another folder.") from error
    return written


def _plain(name: str, family: Family) -> str:
    """The strategy's name; ConfigError when it can't be one, or is another's."""
    from marl_core.registry.catalog import Catalog

    plain = name.removeprefix(PREFIX)
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", plain) or plain in RESERVED_NAMES or len(plain) > 50:
        raise ConfigError(
            f"NAME: {name!r} can't name a plugin: use small letters, digits and single dashes, a letter first, at most 50, and not "
            f"{' or '.join(RESERVED_NAMES)}; e.g. politeness, or length-limit."
        )
    for listing in Catalog.installed().listings(family.name):
        if listing.name == plain:
            raise ConfigError(
                f"NAME: there is a {family.name} strategy {plain!r} already, of {listing.package} {listing.version}. Choose another name."
            )
    return plain


def _module(name: str) -> str:
    return (PREFIX + name).replace("-", "_")


def _template(name: str) -> str:
    return (files("marl_core") / TEMPLATES / f"{name}.in").read_text(encoding="utf-8")


def _fill(text: str, name: str, family: Family) -> str:
    from marl_core import __version__

    title = name.replace("-", " ")
    value = Template(family.example).substitute(name=name)
    values = {
        "name": name,
        "family": family.name,
        "a_family": family.with_article,
        "package": PREFIX + name,
        "module": _module(name),
        "class_name": "".join(part.capitalize() for part in name.split("-")),
        "title": title[0].upper() + title[1:],
        "version": ".".join(__version__.split(".")[:2]),
        "use": _in_a_config(family.key, value),
        "setting": f"{family.key.path}={value}",
        "settings": "\n".join(_in_a_config(each.key, each.trial) for each in FAMILIES.values() if each.trial),
    }
    return Template(text).substitute(values)


def _in_a_config(key: Key, value: str) -> str:
    """A line of YAML that gives a key this value, with its section around it."""
    *sections, name = key.path.split(".")
    line = f"{name}: {value}"
    for section in reversed(sections):
        line = f"{section}: {{{line}}}"
    return line
