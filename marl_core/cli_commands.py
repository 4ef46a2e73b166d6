"""Commands that installed packages add to `marl`: entry points of the group `marl.command`.

A command that writes configs has to name strategies, which the core never does; so such commands are guests, as the strategies are.
An entry point names a function that typer can make a command of, or a typer app with commands of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from importlib import metadata

import typer

from marl_core.errors import PluginError

GROUP = "marl.command"


def add_commands(app: typer.Typer, points: Iterable[metadata.EntryPoint] | None = None) -> None:
    """Add every installed command. One that is broken, doubled, or called like one of ours says so when it is called."""
    taken = {command.name or str(getattr(command.callback, "__name__", "")) for command in app.registered_commands}
    offered: dict[str, list[metadata.EntryPoint]] = defaultdict(list)
    for point in metadata.entry_points(group=GROUP) if points is None else points:
        offered[point.name].append(point)
    for name, mine in sorted(offered.items()):
        if name not in taken:
            _add(app, name, mine)


def _add(app: typer.Typer, name: str, points: list[metadata.EntryPoint]) -> None:
    owners = sorted({_owner(point) for point in points})
    if len(owners) > 1:
        app.command(name)(_refusal(f"marl {name}: offered by {' and by '.join(owners)}. Uninstall one of them."))
        return
    try:
        found = points[0].load()
        if not (isinstance(found, typer.Typer) or callable(found)):
            raise TypeError(f"{points[0].value} is a {type(found).__name__}, neither a function nor a typer app")
    except Exception as error:
        reason = (
            f"marl {name}: the command of {owners[0]} can't be loaded: {error!r}. Repair or uninstall that package."
        )
        app.command(name)(_refusal(reason))
        return
    if isinstance(found, typer.Typer):
        app.add_typer(found, name=name)
    else:
        app.command(name)(found)


def _owner(point: metadata.EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _refusal(reason: str) -> Callable[[], None]:
    def refuse() -> None:
        """A broken command of an installed package."""
        raise PluginError(reason)

    return refuse
