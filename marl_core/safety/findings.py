"""What the checks before the first update found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class PreflightCheck:
    """One finding: what was checked, whether it holds, in words and in numbers."""

    name: str
    ok: bool
    detail: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Preflight:
    """All findings before the first update."""

    checks: tuple[PreflightCheck, ...]

    def as_dict(self) -> dict[str, Any]:
        """For the run folder."""
        return {"ok": all(check.ok for check in self.checks), "checks": [asdict(check) for check in self.checks]}
