"""Who is who in a run: each role, where its weights live, and which reference applies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from marl_core.config.adapter_files import CONFIG_FILE
from marl_core.registry.strategy import Strategy

if TYPE_CHECKING:
    from marl_core.config.plan import Plan


@dataclass(frozen=True, slots=True)
class Role:
    """One row of `marl check`."""

    name: str
    weights: str
    note: str


def describe_roles(plan: Plan) -> list[Role]:
    """Rows for base, policy, reference, rewards, judges and value."""
    return []
