"""The four kinds of choice. No pydantic here: the command line shows them before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FamilyName = Literal["reference", "reward", "quantization", "observer"]


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of choice: the config key, the entry-point group, and the hook each member must have."""

    name: FamilyName
    required_hook: str | None

    @property
    def group(self) -> str:
        """Entry-point group, e.g. `marl.reward`."""
        return f"marl.{self.name}"


FAMILIES: dict[FamilyName, Family] = {
    "reference": Family("reference", "marl_reference"),
    "reward": Family("reward", "marl_reward"),
    "quantization": Family("quantization", "marl_quantization"),
    "observer": Family("observer", None),
}
