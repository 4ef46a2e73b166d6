"""Tables for the command line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from marl_core.errors import PluginError, warn
from marl_core.plan.describe import explain, summary
from marl_core.registry.catalog import Catalog, Listing
from marl_core.registry.families import Family

if TYPE_CHECKING:
    from marl_core.plan.memory import MemoryEstimate
    from marl_core.plan.plan import Plan

PIPE_WIDTH = 160


def show_plan(plan: Plan) -> None:
    """Each role with its weights, what is held once and twice and which reference applies, then the warnings."""
    table = _table("role", "weights", "note")
    for role in plan.describe():
        table.add_row(role.name, Text(role.weights), Text(role.note))
    output = console()
    output.print(table)
    for sentence in explain(plan):
        _say(output, Text(sentence))
    show_warnings(plan.warnings())


def show_warnings(warnings: Iterable[str]) -> None:
    """What will run and may not be what was meant: in the one style of all warnings."""
    for warning in warnings:
        warn(warning)


def show_unseen(sentence: str) -> None:
    """What `marl check` could not look at."""
    _say(console(), Text(f"note: {sentence}", "yellow"))


def show_notes(notes: Sequence[str]) -> int:
    """What was found in the run folder; how many notes that are."""
    for note in notes:
        _say(console(), Text(note))
    return len(notes)


def show_memory(memory: MemoryEstimate) -> None:
    """Bytes per role: this run, and the same with four models."""
    table = _table("memory (estimate)", "this run", "four models", "what")
    for role in memory.roles:
        table.add_row(role.name, _size(role.shared), _size(role.separate), Text(role.what))
    table.add_row(
        "sum",
        _size(memory.shared),
        _size(memory.separate),
        f"{memory.separate / max(memory.shared, 1):.1f} times as much",
    )
    table.add_row(
        "peak", _size(memory.peak), "", "the most at one moment: what stays, and sampling or update; or loading"
    )
    output = console()
    output.print(table)
    _say(output, Text(memory.caution))


def show_plugins(catalog: Catalog, families: Iterable[Family]) -> None:
    """Every strategy that is installed, with its first line of documentation or the reason why it can't be used."""
    table = _table("name", "family", "package", "version", "what it is")
    for family in families:
        for listing in catalog.listings(family.name):
            about, is_broken = _about(catalog, listing)
            style = "red" if is_broken else ""
            row = (listing.name, listing.family, listing.package, listing.version, about)
            table.add_row(*(Text(cell, style) for cell in row))
    console().print(table)


def _about(catalog: Catalog, listing: Listing) -> tuple[str, bool]:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = catalog.load(listing.family, listing.qualified_name)
    except PluginError as error:
        return f"broken: {error}", True
    except Exception as error:
        return f"broken: {error!r}", True
    remarks = [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)]
    doubled = sum(other.name == listing.name for other in catalog.listings(listing.family)) > 1
    if doubled:
        remarks.append(f"offered twice: write {listing.qualified_name}")
    return "; ".join([summary(loaded.strategy_class) or "(no docstring)", *remarks]), False


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in ("this run", "four models") else "left")
    return table


def _say(output: Console, sentence: Text) -> None:
    """A sentence: on a terminal broken between words, in a pipe one line."""
    output.print(sentence, soft_wrap=not output.is_terminal)


def console() -> Console:
    """Where tables go: as wide as the terminal, or wide enough for a file."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
