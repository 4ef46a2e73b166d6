"""Deprecation warnings: what is deprecated still works for one minor version, and says what to use instead."""

from __future__ import annotations

from pydantic import BaseModel

from marl_core.errors import MarlDeprecationWarning, warn


def gone_in(since: str) -> str:
    """The version that removes what version `since` deprecated: `0.2` -> `0.3`."""
    major, minor = (int(part) for part in since.split(".")[:2])
    return f"{major}.{minor + 1}"


def warn_deprecated(what: str, instead: str, since: str) -> None:
    """Warn (MarlDeprecationWarning) that `what` will be removed, and name what replaces it."""
    warn(deprecation(what, instead, since), MarlDeprecationWarning)


def deprecation(what: str, instead: str, since: str) -> str:
    """The words of that warning."""
    return f"{what} is deprecated since {since} and gone in {gone_in(since)}: use {instead}"


def warn_options(model: BaseModel, where: str) -> None:
    """Say which of the given options are declared `Field(deprecated='since 0.2: use other')`."""
    for name in sorted(model.model_fields_set):
        note = type(model).model_fields[name].deprecated
        if isinstance(note, str):
            warn(f"{where}{name} is deprecated {note}", MarlDeprecationWarning)
