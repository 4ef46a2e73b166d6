"""Say what marl, or something in a folder of packages, asks for and this Python hasn't or has in another version: `unmet.py FOLDER`.

The wheels were installed without their dependencies, so nobody has looked yet. Prints one line for each, and nothing where all is well.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

OURS = "marl-core"
EXTRAS = ("", "bitsandbytes", "torchao", "curves", "trackers", "processes", "quickstart")
"""Of marl: those that are measured here. Of other packages no extra counts."""


def unmet(folder: str) -> Iterator[str]:
    """One line for each requirement that isn't met."""
    for package in metadata.distributions(path=[folder]):
        name = package.metadata["Name"]
        extras = EXTRAS if name == OURS else ("",)
        for line in package.requires or ():
            asked = Requirement(line)
            if asked.name == OURS or not _applies(asked, extras):
                continue
            try:
                found = metadata.version(asked.name)
            except metadata.PackageNotFoundError:
                yield f"{name} asks for {asked.name}{asked.specifier}, which is not here"
                continue
            if not asked.specifier.contains(found, prereleases=True):
                yield f"{name} asks for {asked.name}{asked.specifier}, and {found} is here"


def _applies(asked: Requirement, extras: tuple[str, ...]) -> bool:
    return asked.marker is None or any(asked.marker.evaluate({"extra": extra}) for extra in extras)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    for line in unmet(sys.argv[1]):
        print(line)
