"""RunConfig: everything a run was asked to do. Strict types, no unknown keys, finite numbers.

Defaults are settings we would defend for a first run; the units are in the names or the descriptions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Unpack, overload

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from marl_core.config.adapter_config import PolicySection, ValueOn, ValueSection
from marl_core.config.changes import changed
from marl_core.config.choice import Choice, ReferenceChoice, RewardChoice
from marl_core.config.ppo_config import ClipSection, KLSection, PPOSection, ShapingSection
from marl_core.config.prompt_template import NOT_A_TEMPLATES, columns_of
from marl_core.config.section import FROM_FAMILY_RECORD, Section
from marl_core.config.speed_config import SpeedSection
from marl_core.registry.path_text import PathText

if TYPE_CHECKING:
    from marl_core.config.keys import (
        DataKeys,
        EvalKeys,
        ModelKeys,
        Named,
        PolicyKeys,
        PPOKeys,
        RunKeys,
        SamplingKeys,
        Scorer,
        ShapingKeys,
        SpeedKeys,
        ValueKeys,
    )

__all__ = [
    "ClipSection",
    "DataSection",
    "EvalSection",
    "KLSection",
    "ModelSection",
    "PPOSection",
    "PolicySection",
    "RunConfig",
    "RunSection",
    "SamplingSection",
    "Section",
    "ShapingSection",
    "SpeedSection",
    "ValueSection",
]


Dtype = Literal["float32", "bfloat16", "float16"]


def _dtype_name(value: Any) -> Any:
    """`torch.float32` as `float32`, without torch, which whoever has such an object has imported."""
    return str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value


class ModelSection(Section, at="model"):
    """The one base model."""

    path: PathText = Field(min_length=1)
    """Folder or hub name of a causal language model."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    tokenizer: PathText | None = None
    """Folder or hub name of the tokenizer; the model's own when absent."""
    dtype: Annotated[Dtype, BeforeValidator(_dtype_name, json_schema_input_type=Dtype)] = "bfloat16"
    """Dtype of the frozen base; adapters and heads are always float32."""
    attention: str | None = None
    """Attention implementation for transformers, e.g. sdpa or eager."""
    trust_remote_code: bool = False
    """Run code shipped with the model. Needs `revision` for a hub name."""
    gradient_checkpointing: bool = False
    """Recompute activations during the update to save memory."""
    shard: Literal["none", "fsdp2"] = "none"
    """`fsdp2`: each of several processes holds its share of the base's layers and fetches the rest as it computes."""


class DataSection(Section, at="data"):
    """The prompts."""

    prompts: PathText = Field(min_length=1)
    """A .json, .jsonl, .csv or .parquet file, or a datasets name."""
    split: str = "train"
    """Split, for a datasets name."""
    subset: str | None = None
    """Configuration of a data set that has several, e.g. `main`."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of a datasets name."""
    field: str = "prompt"
    """Column with the prompt: a text, or a list of chat messages."""
    prompt_template: str | None = None
    """The prompt made of columns, instead of `field`: `"Question: {question}\\nAnswer:"`. A literal brace is doubled."""
    chat: bool = False
    """A text is one user message, rendered with the model's chat template; lists of messages always are."""
    system_prompt: str | None = Field(default=None, min_length=1)
    """System message before each chat prompt that brings none of its own."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Options of the chat template for all prompts, e.g. `{enable_thinking: false}`, as transformers' `apply_chat_template` takes
    them. A row's own, in columns `chat_template_kwargs` and `tools`, win."""
    max_prompt_tokens: PositiveInt | None = None
    """Longest prompt allowed, in tokens; what the model's positions leave beside max_new_tokens when absent."""
    on_long: Literal["error", "drop", "truncate-left"] = "error"
    """What to do with a longer prompt. `truncate-left` takes away the oldest text, and leaves what the tokenizer puts first, the
    chat template's own and system messages."""
    on_empty: Literal["error", "drop"] = "error"
    """What to do with an empty prompt."""
    on_control: Literal["error", "drop", "parse", "as-text"] = "error"
    """What to do with a prompt whose text spells a control token, e.g. the EOS: refuse it, drop it, let the tokenizer parse it (a
    template written out), or keep it as plain text."""
    limit: PositiveInt | None = None
    """Use only the first rows of the training prompts, this many of them; held-out prompts have `eval.limit`."""
    shuffle: bool = True
    """New order each epoch, from the run's seed."""

    @model_validator(mode="after")
    def _one_source_of_text(self) -> Self:
        if self.prompt_template is not None and columns_of(self.prompt_template) and self.field != "prompt":
            raise ValueError("field is never used with prompt_template; remove one of them")
        return self

    @field_validator("chat_template_kwargs")
    @classmethod
    def _not_marls_own(cls, value: dict[str, Any]) -> dict[str, Any]:
        reserved = sorted(value.keys() & NOT_A_TEMPLATES)
        if reserved:
            raise ValueError(f"{', '.join(reserved)}: marl sets this itself; remove it")
        return value


class SamplingSection(Section, at="sampling"):
    """How responses are sampled."""

    max_new_tokens: PositiveInt = 48
    """Longest response, in tokens."""
    min_new_tokens: NonNegativeInt = 0
    """No stop before this many tokens; log-probs leave the stop tokens out there too."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; all log-probs use it too."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling. Below 1 the sampled distribution is not the scored one."""
    top_k: NonNegativeInt = 0
    """Top-k sampling, 0 is off. Above 0 the sampled distribution is not the scored one."""
    rows: PositiveInt | None = None
    """Most responses sampled at once: bounds the cache of keys and values. Those of one prompt stay together. Absent: a whole batch."""
    stop: list[str] = Field(default_factory=list)
    """Further stop tokens beside the tokenizer's EOS; each must be a single token."""
    stop_strings: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Texts that end a response. The token that completes one still counts; rewards read the text before it."""

    @model_validator(mode="after")
    def _min_fits_max(self) -> Self:
        if self.min_new_tokens and self.stop_strings:
            raise ValueError(
                "min_new_tokens with stop_strings: a text can't be kept from being sampled as a stop token can; remove one"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}")
        return self

    def at_once(self, count: int, samples: int) -> int:
        """How many of `count` responses are sampled together: as `rows` says, but never fewer than the `samples` of one prompt."""
        return count if self.rows is None else min(max(self.rows // samples, 1) * samples, count)


class EvalSection(Section, at="eval"):
    """Evaluation on held-out prompts, before, during and after training."""

    if TYPE_CHECKING:

        def __init__(self, **keys: Unpack[EvalKeys]) -> None:
            """The keys of a file, strategies as names, objects or dicts."""

    prompts: PathText | None = None
    """Held-out prompts file or datasets name, read as `data` says; no evaluation when absent."""
    split: str | None = None
    """Split, for a datasets name; `data.split` when absent."""
    every: NonNegativeInt = 0
    """Evaluate every this many steps; 0: only before and after."""
    limit: PositiveInt | None = None
    """Use only the first prompts."""
    seeds: PositiveInt = 1
    """Sampling seeds; the spread over them is reported."""
    judges: dict[str, RewardChoice] = FROM_FAMILY_RECORD
    samples: NonNegativeInt = 3
    """Responses kept with their texts."""


class RunSection(Section, at="run"):
    """Where and how."""

    folder: PathText | None = Field(default=None, min_length=1)
    """Run folder; without one nothing is written."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initialization, sampling and data order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the base lives."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads; torch's default when absent. Exact resume needs the same number."""
    checkpoint_every: NonNegativeInt = 0
    """Save every this many steps; 0: only at the end."""
    keep: PositiveInt = 2
    """Checkpoints kept."""
    timeout_seconds: PositiveFloat = 600.0
    """How long one of several processes waits for the others before it ends the run."""


class RunConfig(Section, at=""):
    """One run. Sections are explained in docs/config.md. ConfigError, with a line for each mistake, for what can't be one."""

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            model: ModelSection | ModelKeys,
            quantization: Named = ...,
            policy: PolicySection | PolicyKeys | Named = ...,
            reference: Named,
            reward: Scorer | Sequence[Scorer] = ...,
            value: ValueSection | ValueKeys | ValueOn | Named = ...,
            data: DataSection | DataKeys | None = ...,
            sampling: SamplingSection | SamplingKeys = ...,
            ppo: PPOSection | PPOKeys = ...,
            shaping: ShapingSection | ShapingKeys = ...,
            speed: SpeedSection | SpeedKeys = ...,
            eval: EvalSection | EvalKeys = ...,
            observers: Named | Sequence[Named] = ...,
            run: RunSection | RunKeys = ...,
        ) -> None:
            """Each section as its class, or as a dict of its keys; strategies as names, objects or dicts."""

    model: ModelSection
    """The one base model."""
    quantization: Choice = FROM_FAMILY_RECORD
    policy: PolicySection = Field(default_factory=PolicySection, validate_default=True)
    """The trained adapter."""
    reference: ReferenceChoice
    reward: list[RewardChoice] = FROM_FAMILY_RECORD
    value: Annotated[
        ValueSection, BeforeValidator(ValueSection.long_form, json_schema_input_type=ValueSection | ValueOn)
    ] = Field(default_factory=ValueSection, validate_default=True)
    """The value function."""
    data: DataSection | None = None
    """The training prompts; `marl run` needs them, rollouts made by hand do not."""
    sampling: SamplingSection = Field(default_factory=SamplingSection)
    """How responses are sampled."""
    ppo: PPOSection = Field(default_factory=PPOSection)
    """The algorithm."""
    shaping: ShapingSection = Field(default_factory=ShapingSection)
    """What happens to the summed scores before PPO sees them."""
    speed: SpeedSection = Field(default_factory=SpeedSection)
    """Fast paths."""
    eval: EvalSection = Field(default_factory=EvalSection)
    """Evaluation on held-out prompts."""
    observers: list[Choice] = FROM_FAMILY_RECORD
    run: RunSection = Field(default_factory=RunSection)
    """Where and how."""

    @overload
    def with_changes(self, changes: Mapping[str, Any], /) -> Self: ...

    @overload
    def with_changes(self, key: str, value: Any, /, *more: Any) -> Self: ...

    def with_changes(self, *changes: Any) -> Self:
        """A new config with other values at some keys, checked as a whole; this one stays as it is.

        `config.with_changes("ppo.kl.coef", 0.1, "reward.0.weight", 0.5)`: dotted keys, each followed by its value; or one mapping of them.
        Keys reach into short forms and lists as those of `--set` do. A mapping for a section is merged into it: it changes the keys that
        it names, and the others stay; a section object (`PPOSection(steps=20)`) replaces the whole. Strategies that were given as objects
        stay the same objects. ConfigError with a line for each problem.
        """
        return changed(self, changes)
