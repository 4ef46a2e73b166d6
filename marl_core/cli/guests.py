"""Commands that installed packages add to `marl`: entry points of the group `marl.command`.

A command that writes configs has to name strategies, which the core never does; so such commands are guests, as the strategies are.
An entry point names a function that typer can make a command of, or a typer app with commands of its own. Names and owners come from
the packages' metadata; a guest is imported when its command is called, and not before.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

from marl_core.errors import MarlError, PluginError

GROUP = "marl.command"


def add_commands(app: typer.Typer, points: Iterable[metadata.EntryPoint] | None = None) -> None:
    """Add every installed command. One that is broken, doubled, or called like one of ours says so when it is called."""
    own_names = {command.name or str(getattr(command.callback, "__name__", "")) for command in app.registered_commands}
    offered: dict[str, list[metadata.EntryPoint]] = defaultdict(list)
    for point in metadata.entry_points(group=GROUP) if points is None else points:
        offered[point.name].append(point)
    for name, owned_points in sorted(offered.items()):
        if name not in own_names:
            command_class = type("Guest", (GuestCommand,), {"points": tuple(owned_points)})
            app.command(name, cls=command_class, add_help_option=False)(_nothing)


class GuestCommand(TyperCommand):
    """What stands for a command until it is called: its arguments are read, and its help is written, by the real one."""

    points: tuple[metadata.EntryPoint, ...] = ()

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The real command's context; PluginError when it can't be had."""
        return self.loaded().make_context(info_name, args, parent=parent, **extra)

    def loaded(self) -> Any:
        """Import the real command. Whatever goes wrong is the package's, and named so; only Ctrl-C passes."""
        name, owners = self.points[0].name, sorted({_owner(point) for point in self.points})
        if len(owners) > 1:
            raise PluginError(f"marl {name}: offered by {' and by '.join(owners)}. Uninstall one of them.")
        try:
            command = _command(name, self.points[0].load(), self.points[0].value)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a module may call sys.exit as it is imported
            place = _place(error, self.points[0].value.partition(":")[0])
            raise PluginError(
                f"marl {name}: the command of {owners[0]} can't be loaded: {error!r}. {place}Repair or uninstall that package."
            ) from error
        command.invoke = _blaming(
            command.invoke, f"marl {name}: the command of {owners[0]}", self.points[0].value.partition(":")[0]
        )
        return command

    def get_short_help_str(self, limit: int = 45) -> str:
        """For `marl --help`: the first line of what the source says, which is read and not run; else whose it is."""
        owners = sorted({_owner(point) for point in self.points})
        summary = _first_line(self.points[0].value) if len(owners) == 1 else ""
        self.help = summary or f"From {' and '.join(owners)}."
        return super().get_short_help_str(limit)


def _blaming(invoke: Callable[[Any], Any], label: str, module: str) -> Callable[[Any], Any]:
    """Run a guest's command, which `module` defines; what goes wrong there isn't marl's."""

    def call(context: Any) -> Any:
        try:
            return invoke(context)
        except (MarlError, typer.Abort):
            raise
        except Exception as error:
            if hasattr(
                error, "exit_code"
            ):  # wrong usage, or an end that was asked for, in whichever click typer carries
                raise
            place = _place(error, module)
            more = "shows more" if place else "shows where"
            raise PluginError(
                f"{label} failed: {error!r}. {place}Report it to its authors (--debug {more})."
            ) from error

    return call


def _nothing() -> None:
    """A command of an installed package."""


def _command(name: str, target_object: object, target: str) -> Any:
    """The command as typer makes it, by itself."""
    if not (isinstance(target_object, typer.Typer) or callable(target_object)):
        raise TypeError(f"{target} is a {type(target_object).__name__}, neither a function nor a typer app")
    wrapper = typer.Typer(rich_markup_mode=None)
    wrapper.callback()(_nothing)  # so that a single command keeps its name
    if isinstance(target_object, typer.Typer):
        wrapper.add_typer(target_object, name=name)
    else:
        wrapper.command(name)(target_object)
    group: Any = get_command(wrapper)
    return group.commands[name]


def _first_line(target: str) -> str:
    """The first line of a function's docstring, or of its module's, found in the source; empty when it can't be."""
    module, _, name = target.partition(":")
    package, *submodules = module.strip().split(".")
    try:
        spec: Any = find_spec(package)  # of a top package: finding one inside it would import it
        paths = [Path(folder, *submodules) for folder in spec.submodule_search_locations or ()]
        candidates = [
            candidate for path in paths for candidate in (path.with_name(f"{path.name}.py"), path / "__init__.py")
        ]
        candidates = candidates if submodules else [Path(spec.origin)]
        tree = ast.parse(next(candidate for candidate in candidates if candidate.is_file()).read_text(encoding="utf-8"))
    except Exception:  # a stranger's source, or none: a zip, a compiled module
        return ""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name.strip()]
    text = ast.get_docstring(functions[0] if functions else tree) or ""
    return text.strip().split("\n", 1)[0]


def _place(error: BaseException, module: str) -> str:
    from marl_core.registry.raised_from import (
        raised_from,
    )  # not before there is something to tell: `marl --help` needs no pydantic

    return raised_from(error, module.strip())


def _owner(point: metadata.EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
