"""Strategy: one choice a config can make. Its fields are the options, its hooks the behaviour."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self
from weakref import ReferenceType, ref

import pluggy
from pydantic import ConfigDict, PrivateAttr

from marl_core.registry.problems import PlainlyTold

if TYPE_CHECKING:
    from torch import Tensor

hookimpl = pluggy.HookimplMarker("marl")
"""Mark a Strategy's method as the implementation of the hook with that name."""

API = 1
"""The version of everything docs/api.md lists: hooks, base classes, data. Raised when something there breaks."""


class Strategy(PlainlyTold):
    """Base class of all strategies: pydantic options and pluggy hooks in one class.

    Types are strict ("3" is not 3), unknown options are refused, numbers are finite, instances are immutable.
    ConfigError for wrong options given to the constructor.
    """

    api: ClassVar[int] = API
    """The API version that the class was written for; say it in your own: `api: ClassVar[int] = 1`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    _run: ReferenceType[object] | None = PrivateAttr(None)
    """The run that this strategy serves."""

    def fresh(self) -> Self:
        """A new strategy with the same options, and none of the state that a run has given to this one."""
        copy = self.model_copy()
        object.__setattr__(copy, "__pydantic_private__", None)
        copy.model_post_init(None)  # pydantic's own: private attributes as at the start
        return copy

    def serve(self, run: object | None) -> Self:
        """This strategy, serving `run` from now on (None: no run); a fresh one where this one serves another run already."""
        other = self._run() if self._run is not None else None
        if run is not None and other is not None and other is not run:
            return self.fresh().serve(run)
        self._run = ref(run) if run is not None else None
        return self

    @classmethod
    def _told_fixed(cls, name: str, value: Any) -> str:
        if name in cls.model_fields:
            return f"{cls.__name__}: the option {name} can't be changed once it is made; make a new {cls.__name__}({name}=...)."
        return (
            f"{cls.__name__}: {name!r} isn't declared, and options can't be changed. Keep state in a name with an underscore, declared in "
            f"the class: `_{name.lstrip('_')}: {_type_name(value)} = {_start(value)}`."
        )

    @classmethod
    def options_for_stored(cls, said: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """For a quantization: the options with which it loads a model folder whose weights are quantized already.

        `said` is the quantization_config of the folder's config.json. None: it can't load such weights.
        """
        return None

    # pluggy keeps plugins in sets and finds them with ==: a strategy is itself, whatever its options.
    def __eq__(self, other: object) -> bool:
        return self is other

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        cls.__hash__ = object.__hash__  # type: ignore[method-assign]  # frozen models write a hash of their fields


def _type_name(value: Any) -> str:
    return "Any" if value is None else type(value).__name__


def _start(value: Any) -> str:
    """What state of this kind may start with, as the line that declares it says."""
    return repr(type(value)()) if isinstance(value, bool | int | float | str | list | dict) else "PrivateAttr(None)"


def api_problem(strategy_class: type[Strategy]) -> str | None:
    """Why a strategy's `api` doesn't fit this marl, None when it does."""
    version: object = strategy_class.api
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        return f"its api is {version!r}; write the version it was made for, e.g. `api: ClassVar[int] = {API}`"
    if version > API:
        return f"it was made for api {version}, this marl-core offers {API}: upgrade marl-core, or install an older version of it"
    if version < API:
        return f"it was made for api {version}, this marl-core offers {API} (docs/api.md says what changed): ask for a newer version of it"
    return None


@dataclass(frozen=True, slots=True)
class StopRun:
    """What a hook returns to end the run after the step it is in, as if that were the last of `ppo.steps`.

    The last evaluation is made and the final adapter is written; observers hear `marl_run_end`, and `RunResult.stopped` is the
    reason. `--resume` goes on from there.
    """

    reason: str
    """A clause for people, such as `KL 12.3 nats is above 10`: it is printed, and stands in ended.json and the report."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How transformers loads the base, and what the loaded base can do.

    `config` is handed to `from_pretrained(quantization_config=...)`; None loads unquantized.
    `after_load` is called once with the loaded model, for settings without which the backend computes wrong numbers.
    """

    config: Any = None
    after_load: Callable[[Any], None] | None = None
    batch_invariant: bool = True
    """False when a row's log-probs depend on the other rows of its batch."""
    same_kernels: bool = True
    """False when train mode and eval mode use different kernels, so that the core must stay in one mode."""
    bytes_per_weight: float | None = None
    """Bytes of one quantized linear weight, for the memory estimate; None means the compute dtype's."""


ANY_QUANTIZATION = "*"
"""In `Adapter.packed`: a kind that never reads the base's weights, so it doesn't matter how they are held."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """What is trained: how PEFT makes it, and what can't be seen of it in time, or at all, by looking.

    ValueError for numbers that can't be meant.
    """

    config: Callable[[], Any]
    """Called when the adapter is made, with torch and peft there: a new `peft.PeftConfig`. The core sets its task type, inference mode,
    layers (`target_modules`), dropout and seeds; the strategy sets all else."""
    learned: int
    """How many numbers learn: an optimizer holds 16 bytes for each."""
    held: int = 0
    """Bytes that it holds beside them, e.g. frozen projections."""
    kept: float = 1.0
    """How many of a LoRA's activations a pass keeps for backward: 2.4 for DoRA, 1 for a LoRA."""
    folded: bool = False
    """Whether a token costs it several times what it costs a LoRA, so that sampling goes through copies of the weights with the adapter
    merged in (`speed.merge_for_sampling`): PEFT must be able to merge it."""
    start: Literal["base", "rounded"] = "base"
    """What a fresh one computes: bitwise what the base does, or that to rounding."""
    packed: frozenset[str] = frozenset()
    """The quantizations it was tried on, by name: `bnb-4bit`, `bnb-8bit`. `*`: it never reads the base's weights, so any will do.
    On another one it is refused: some kinds take packed bytes for weights and compute something else without a word."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Factors on the learning rate by a part of a parameter's name: `{"lora_B": 16.0}`."""

    def __post_init__(self) -> None:
        """ValueError for what can't be meant; sets and tables become ones that don't change."""
        numbers = {"learned": (self.learned, 0), "held": (self.held, 0), "kept": (self.kept, 0)}
        for name, (number, least) in numbers.items():
            whole = name == "kept" or isinstance(number, int)
            if isinstance(number, bool) or not isinstance(number, int | float) or not whole or not number >= least:
                raise ValueError(f"Adapter.{name} is {number!r}; it must be a number, {least} or more")
        if self.start not in ("base", "rounded"):
            raise ValueError(f"Adapter.start is {self.start!r}; it must be 'base' or 'rounded'")
        packed: Any = self.packed
        if isinstance(packed, str) or not all(isinstance(name, str) for name in self.packed):
            raise ValueError(f"Adapter.packed is {self.packed!r}; it must be a set of names of quantizations")
        if not all(isinstance(rate, int | float) and 0 < rate < float("inf") for rate in self.rates.values()):
            raise ValueError(f"Adapter.rates is {dict(self.rates)!r}; each factor must be a finite number above 0")
        object.__setattr__(self, "packed", frozenset(self.packed))
        object.__setattr__(self, "rates", MappingProxyType(dict(self.rates)))

    def was_tried_on(self, quantization: str) -> bool:
        """Whether the kind may stand on weights that this quantization packs."""
        return ANY_QUANTIZATION in self.packed or quantization in self.packed


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """What an advantage estimator is given: B responses of T tokens, those of one prompt one after the other.

    All tensors are on one device, without gradient, and copies: writing into them changes nothing else.
    """

    rewards: Tensor
    """[B, T] float32: the shaped scores on their tokens, less the KL penalty where it is in the reward; 0 where the mask is false."""
    mask: Tensor
    """[B, T] bool: which tokens count."""
    values: Tensor | None = None
    """[B, T] float32, 0 where the mask is false: the value function's estimates. None for an estimator that needs none."""
    samples_per_prompt: int = 1
    """How many responses in a row answer the same prompt."""
    gamma: float = 1.0
    """`ppo.gamma`, the discount."""
    lam: float = 0.95
    """`ppo.lam`, lambda of generalized advantage estimation."""
    whiten: bool = True
    """`ppo.whiten`: whether advantages are to have mean 0 and variance 1 over the batch."""

    @property
    def scores(self) -> Tensor:
        """[B] float32: the sum of each response's rewards."""
        return self.rewards.masked_fill(~self.mask, 0.0).sum(dim=1)


@dataclass(frozen=True, slots=True)
class Estimator:
    """How rewards become advantages, and what that needs.

    `estimate` gives advantages: a floating tensor [B, T], or [B], which then stands on each of a response's tokens. One that
    needs values gives a pair: advantages and returns, [B, T], which the value function learns. The core checks shape, dtype and
    finite numbers, and sets masked places to 0.
    """

    estimate: Callable[[AdvantageInputs], Tensor | tuple[Tensor, Tensor]]
    """Called at each step, without gradient; the same inputs must give the same advantages."""
    needs_values: bool = False
    """Whether there must be a value function; without the need there is none."""
    needs_groups: bool = False
    """Whether it compares responses to one prompt: `ppo.samples_per_prompt` must then be 2 or more."""
    uses_token_rewards: bool = False
    """Whether it matters on which token a reward stands; else only their sum over a response does."""
    origin: str = ""
    """Who offers it, for messages; filled in by the core."""
