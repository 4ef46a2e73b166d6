"""What a foreign config said, what was taken over, what was assumed because it said nothing, and why the rest was not taken."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, isfinite
from typing import Any

from marl_core import Catalog, ConfigError
from marl_plugins.writing import usual_config

NO_SUCH_SETTING = "marl has no such setting"
UNKNOWN = (
    "marl has no such setting, and the releases of the trainer that marl knows have no such key: is the name right?"
)
MISSING = "is missing: "
"""How the note on a key begins that a config needs and nobody gave."""
SMALL_RATE = 1e-5
"""Below it a LoRA hardly moves in a run of usual length."""
Note = tuple[str, str]
"""A key of the other trainer, and what is said of it."""


@dataclass(frozen=True)
class Carried:
    """A config of another trainer as marl's."""

    config: dict[str, Any]
    """marl's config."""
    refused: list[Note]
    """Keys that were not converted, or not as they were, with the reason."""
    assumed: list[Note] = field(default_factory=list)
    """Keys that were not given, with the value that was taken and where it is from."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Further files that the config needs, by name: their texts."""
    partly: frozenset[str] = frozenset()
    """Keys of `refused` that became something in the config, but not as they were."""


@dataclass(frozen=True)
class Default:
    """A value for a key that nobody gave."""

    value: Any
    origin: str
    """Where it is from, to be read after the value: `TRL 0.11.4's default`."""


@dataclass
class ForeignConfig:
    """The keys that nobody has taken over yet, and notes on what was changed on the way."""

    remaining: dict[str, Any]
    defaults: Mapping[str, Default] = field(default_factory=dict)
    """What the other trainer does where a key is absent, by its first name."""
    notes: list[Note] = field(default_factory=list)
    assumed: dict[str, str] = field(default_factory=dict)
    unknown: Sequence[str] = ()
    """Keys that the other trainer doesn't have either."""
    lost: set[str] = field(default_factory=set)
    """Keys with a note that became nothing in the config."""

    def take(self, *names: str, default: Any = None) -> Any:
        """The value of the first of these keys that is there; all of them count as taken over.

        Where none is, the other trainer's own default for the first name, which is noted as assumed; else `default`.
        """
        values = [self.remaining.pop(name) for name in names if name in self.remaining]
        given = next((value for value in values if value is not None), None)
        if given is not None:
            return given
        usual = self.defaults.get(names[0])
        if usual is None:
            return default
        self.assumed[names[0]] = f"not given; {_shown(usual.value)} is {usual.origin}"
        return usual.value

    def number(self, *names: str, default: float | None = None) -> Any:
        """The same as a number; whole ones as int. YAML reads 1e-5 as a text. ConfigError for what is no finite number."""
        key = next((name for name in names if self.remaining.get(name) is not None), names[0])
        value = self.take(*names, default=default)
        if value is None:
            return None
        try:
            number = float("nan" if isinstance(value, bool) else value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if not isfinite(number):
            raise ConfigError(f"{key}: {value!r} is not a number that can be used. Give a finite one.")
        return int(number) if number.is_integer() and not isinstance(value, float) else number

    def count(self, *names: str, default: int | None = None) -> Any:
        """The same as a whole number of at least 1: a size that others are multiplied with or divided by."""
        key = next((name for name in names if self.remaining.get(name) is not None), names[0])
        value = self.number(*names, default=default)
        if value is not None and (value < 1 or value != int(value)):
            raise ConfigError(f"{key}: {value:g} is no count. Give a whole number of 1 or more.")
        return None if value is None else int(value)

    def assume(self, key: str, why: str) -> None:
        """Say what was taken for a key that nobody gave; what was said before stays."""
        self.assumed.setdefault(key, why)

    def note(self, key: str, why: str, *, lost: bool = False) -> None:
        """Say that a key was not taken over as it was; `lost`: that nothing came of it."""
        self.notes.append((key, why))
        if lost or why.startswith(MISSING):
            self.lost.add(key)

    def carried(
        self, config: Mapping[str, Any], reasons: Mapping[str, str], files: Mapping[str, str] | None = None
    ) -> Carried:
        """The config with all notes, and every key that nobody took with its reason.

        Keys that the other trainer doesn't have stand first, for they may be slips of the pen; those that change nothing stand last.
        """
        unknown = [(key, UNKNOWN) for key in self.unknown if key in self.remaining]
        rest = [(key, reasons.get(key, NO_SUCH_SETTING)) for key in self.remaining if key not in self.unknown]
        refused = sorted([*unknown, *self.notes, *rest], key=lambda pair: pair[1].startswith("not needed"))
        partly = frozenset(key for key, _ in self.notes) - self.lost
        return Carried(without_none(config), refused, list(self.assumed.items()), files or {}, partly)


def _shown(value: Any) -> str:
    """A value as people write it in a config."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def offers(family: Any, name: str) -> bool:
    """Whether a strategy of this name is installed."""
    return any(listing.name == name for listing in Catalog.installed().listings(family))


def steps_of(
    foreign: ForeignConfig, epochs_key: str, epochs: float, rows: int | None, batch: int, *, whole_passes: bool = False
) -> int | None:
    """PPO steps that so many passes over so many prompts make; None, with a note, when the rows aren't known.

    `whole_passes`: the trainer rounds each pass up to whole batches, not their sum.
    """
    if rows:
        exact = epochs * rows / batch
        steps = ceil(epochs * ceil(rows / batch)) if whole_passes else ceil(exact)
        return rounded_up(foreign, epochs_key, exact, f"{epochs:g} x {rows} prompts / {batch}", steps)
    foreign.note(
        epochs_key,
        f"marl counts PPO steps: set ppo.steps to {epochs:g} x prompts / {batch}; the prompts can't be counted here",
    )
    return None


def rounded_up(foreign: ForeignConfig, key: str, exact: float, counted: str, steps: int | None = None) -> int:
    """Whole PPO steps, at least one; that they were rounded up is noted.

    `exact`: the number before rounding, `counted` how it was counted, `steps` what the trainer rounds it to, if not to the next integer.
    """
    whole = max(1, ceil(exact) if steps is None else steps)
    if whole != exact:
        foreign.note(key, f"{counted} is {exact:.4g} steps; ppo.steps is rounded up to {whole}")
    return whole


@dataclass(frozen=True)
class Processes:
    """How many processes a run had: the trainers' batches are those of one process, marl's are those of all."""

    count: int
    known: bool

    def assume(self, foreign: ForeignConfig, trainer: str, divided: str) -> None:
        """Say that one process was taken where nobody told how many there were. `divided`: what becomes of ppo.steps."""
        if not self.known:
            foreign.assume(
                "number of processes",
                f"taken as 1; {trainer}'s batch is that of one process. If it ran with N GPUs, multiply ppo.batch and "
                f"ppo.minibatch by N{divided}",
            )


DIVIDED = ", and divide ppo.steps by N"


def processes(foreign: ForeignConfig) -> Processes:
    """Out of what a launcher was told, under the names of accelerate, torchrun and deepspeed; ConfigError when that is no count."""
    count = foreign.count("num_processes", "nproc_per_node", "num_gpus")
    return Processes(count or 1, known=count is not None)


def warm_up(
    foreign: ForeignConfig, steps: int | None, ratio_key: str = "warmup_ratio", steps_key: str = "warmup_steps"
) -> int | None:
    """PPO steps of warm-up, given as a number or as a share of all steps."""
    count, ratio = foreign.number(steps_key), foreign.number(ratio_key)
    if count:
        return int(count)
    if ratio and steps:
        rounded = round(float(ratio) * steps)
        if rounded == 0:
            foreign.note(ratio_key, f"{ratio:g} of {steps} steps rounds to 0: there is no warm-up (ppo.warmup_steps)")
        return rounded
    if ratio:
        foreign.note(ratio_key, f"is {ratio:g} of the steps: set ppo.warmup_steps once ppo.steps is known")
    return None


def lora_rate(foreign: ForeignConfig, ppo: dict[str, Any], trains_adapter: bool, is_lora: bool = True) -> None:
    """A learning rate for all weights isn't one for a LoRA: where all were trained, marl's default stands, and that is noted.

    `is_lora`: of other adapters what a usual rate is isn't said; the pre-flight check measures how far a step goes.
    """
    usual, theirs = usual_config().ppo.learning_rate, ppo["learning_rate"]
    if trains_adapter:
        if is_lora and theirs < SMALL_RATE:
            foreign.note(
                "learning_rate",
                f"{theirs:g} is kept, and small for a LoRA: 1e-4 to 5e-4 is usual, marl's default is {usual:g}",
            )
        return
    ppo["learning_rate"] = usual
    default = ", a default," if foreign.assumed.pop("learning_rate", None) else ""
    foreign.note(
        "learning_rate",
        f"{theirs:g}{default} was for training all weights, and is too small for a LoRA, which would hardly move: marl's default {usual:g} "
        "is written. 1e-4 to 5e-4 is usual for a LoRA",
    )


SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
"""Schedules of transformers, which both trainers take, and what marl calls them."""


def schedule(foreign: ForeignConfig) -> str:
    """The schedule of the learning rate; where marl has no such one it is constant, and that is noted."""
    written = str(foreign.take("lr_scheduler_type"))
    if written not in SCHEDULES:
        foreign.note("lr_scheduler_type", f"{written!r}: marl has constant, linear and cosine; constant is taken")
    return SCHEDULES.get(written, "constant")


def names_in(value: Any) -> list[str]:
    """Names as a YAML list, or in one text with commas between them; none of nothing, and of `no`."""
    written = value if isinstance(value, list | tuple) else str("" if value in (None, False) else value).split(",")
    return [name for name in (str(entry).strip() for entry in written) if name]


def without_none(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section without the keys that nobody set."""
    return {key: value for key, value in section.items() if value is not None}


def run_sections(foreign: ForeignConfig, trackers: Collection[str], seed: int) -> dict[str, Any]:
    """Sections observers and run: trackers where some were named, folder, seed and how often to save."""
    asked = names_in(foreign.take("report_to", "log_with"))
    names = [name for name in asked if name in trackers]
    others = [name for name in asked if name not in trackers and name not in ("none", "all")]
    if others:
        foreign.note(
            "report_to", f"marl has no tracker {', '.join(others)}; it has {', '.join(trackers)}", lost=not names
        )
    run = {
        "folder": foreign.take("output_dir", default="runs/imported"),
        "seed": foreign.number("seed", default=seed),
        "checkpoint_every": foreign.number("save_steps"),
    }
    return {
        **({"observers": [{"use": "trackers", "to": names}]} if names else {}),
        "run": without_none(run),
    }
