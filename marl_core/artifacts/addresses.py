"""Where the project lives on the web, from its own metadata: one line of pyproject.toml (`[project.urls]`) fills every address."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from urllib.parse import urlsplit

PLACEHOLDER_DOMAINS = ("example.org", "example.com", "example.net", "invalid")
"""Domains kept free for examples (RFC 2606): an address there is a placeholder that nobody has filled yet."""


def repository() -> str | None:
    """The address of the repository, without a slash at its end; None while pyproject.toml holds a placeholder."""
    return filled(_address("repository"))


def issues() -> str | None:
    """Where faults are reported; None while there is no address."""
    found = repository()
    return None if found is None else f"{found}/issues"


def page(name: str, anchor: str = "") -> str | None:
    """The address of a page of docs/, such as `metrics`; None while there is no address."""
    found = repository()
    return None if found is None else f"{found}/blob/HEAD/docs/{name}.md{f'#{anchor}' if anchor else ''}"


def filled(address: str | None) -> str | None:
    """The address without a slash at its end; None where it is a placeholder."""
    domain = urlsplit(address or "").hostname or ""
    if (
        not domain
        or domain.split(".")[-1] in PLACEHOLDER_DOMAINS
        or ".".join(domain.split(".")[-2:]) in PLACEHOLDER_DOMAINS
    ):
        return None
    return str(address).rstrip("/")


@cache
def _address(label: str) -> str | None:
    """The address that the installed distribution names so."""
    try:
        entries = metadata.metadata("marl-core").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return None
    pairs = dict(entry.split(", ", 1) for entry in entries if ", " in entry)
    return next((address for name, address in pairs.items() if name.lower() == label), None)
