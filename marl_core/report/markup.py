"""HTML that is escaped by construction: whatever isn't Markup already is text."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

VOID = {"meta", "input", "line", "rect", "circle", "polyline", "path"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = Any
"""Markup as it is, None as nothing, an iterable as its members, anything else as escaped text."""


def tag(element: str, /, *children: Child, **attributes: Any) -> Markup:
    """An element. `class_` is class, `data_x` is data-x; an attribute that is None is left out, True has no value."""
    shown = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    if element in VOID:
        return Markup(f"<{element}{shown}>" if element in ("meta", "input") else f"<{element}{shown}/>")
    return Markup(f"<{element}{shown}>{join(children)}</{element}>")


def join(children: Iterable[Child]) -> Markup:
    """Several children in a row."""
    return Markup("".join(_child(child) for child in children))


def _child(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str | int | float):
        return escape(str(child))
    return join(child)


def _attribute(key: str, value: Any) -> str:
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value), quote=True)}"'


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]], **attributes: Any) -> Markup:
    """A table in a box that scrolls sideways when it is too wide."""
    body = [tag("tr", [tag("td", cell) for cell in row]) for row in rows]
    top = tag("thead", tag("tr", [tag("th", cell) for cell in head]))
    return tag("div", tag("table", top, tag("tbody", body), **attributes), class_="wide")


def section(title: str, *children: Child, note: str | None = None) -> Markup:
    """A titled part of the page, with an anchor."""
    anchor = title.lower().replace(" ", "-")
    about = tag("p", note, class_="note") if note else None
    return tag("section", tag("h2", title), about, *children, id=anchor)


def number(value: Any) -> str:
    """Three or four digits that matter; a dash for what isn't there."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if value != value:
        return "–"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        return f"{value:.2e}"
    return (
        f"{value:,.0f}"
        if size >= 1000 or float(value).is_integer()
        else f"{value:.3g}"
        if size >= 100
        else f"{value:.3f}"
    )
