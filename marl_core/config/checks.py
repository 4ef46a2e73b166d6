"""What the core can say about a plan before any weight is read: reasons against, and warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from marl_core.config.plan import Plan


def core_findings(plan: Plan) -> list[str]:
    """Reasons why the run can't work."""
    return []


def core_warnings(plan: Plan) -> list[str]:
    """What will run and may not be what was meant."""
    return []
