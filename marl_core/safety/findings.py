"""Results of the checks before the first update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class PreflightCheck:
    """One check's result: its name, whether it holds, a sentence, and its numbers."""

    name: str
    ok: bool
    detail: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Preflight:
    """The results of all checks before the first update."""

    checks: tuple[PreflightCheck, ...]

    def as_dict(self) -> dict[str, Any]:
        """For the run folder."""
        return {"ok": all(check.ok for check in self.checks), "checks": [asdict(check) for check in self.checks]}
