"""The four kinds of choice. No pydantic here: the command line shows them before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from marl_core.errors import ConfigError, near_match

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


def family_named(name: str) -> FamilyName:
    """The family of this name, as `--family` gives it; ConfigError with the names there are, and the near one."""
    for known in FAMILIES:
        if name == known:
            return known
    near = near_match(name, FAMILIES)
    hint = f" Did you mean {near!r}?" if near else ""
    raise ConfigError(f"--family: {name!r} is none of {', '.join(FAMILIES)}.{hint}")
