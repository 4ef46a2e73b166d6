"""Print the lowest allowed version of everything a user installs, one `name==version` a line: constraints for pip.

`make lowest` installs them. Torch is left out: wheels of older ones are not to be had everywhere, so its bound, the
first release that has what marl calls, is stated and not tested here. Torch and the tools of the tests stay at the versions of
constraints.txt.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOR_USERS = ("bitsandbytes", "curves", "trackers", "report")  # the quickstart's trl has bounds of its own, above these
GIVEN = ("torch", "marl-core")
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def bounds(pyproject: Path = ROOT / "pyproject.toml") -> dict[str, str]:
    """Lowest allowed version by package; ValueError for a dependency that states none."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for name in FOR_USERS for line in extras.get(name, ()))]
    return dict(_lowest(line) for line in wanted if _name(line) not in GIVEN)


def _name(requirement: str) -> str:
    found = _NAME.match(requirement)
    return found.group().lower() if found else ""


def _lowest(requirement: str) -> tuple[str, str]:
    found = re.search(r"(?:>=|==)\s*([0-9][0-9a-z.]*)", requirement)
    if found is None:
        raise ValueError(f"{requirement!r} has no lower bound")
    return _name(requirement), found.group(1)


def tools(names: set[str], constraints: Path = ROOT / "constraints.txt") -> Iterator[str]:
    """The lines of constraints.txt that are not about a package with a bound of its own."""
    for line in constraints.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#") and _name(line) not in names:
            yield line


if __name__ == "__main__":
    lowest = bounds()
    lines = [*(f"{name}=={version}" for name, version in sorted(lowest.items())), *tools(set(lowest))]
    sys.stdout.write("\n".join(lines) + "\n")
