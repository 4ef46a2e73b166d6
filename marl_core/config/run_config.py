"""RunConfig: everything a run was asked to do. Strict types, no unknown keys, finite numbers.

Defaults are settings we would defend for a first run; the units are in the names or the descriptions.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from marl_core.config.choice import ObserverChoice, QuantizationChoice, ReferenceChoice, RewardChoice

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Part(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_by_name=True, use_attribute_docstrings=True
    )


class ModelPart(Part):
    """The one base model."""

    path: str = Field(min_length=1)
    """Folder or hub name of a causal language model."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; the model's own when absent."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Dtype of the frozen base; adapters and heads are always float32."""
    attention: str | None = None
    """Attention implementation for transformers, e.g. sdpa or eager."""
    trust_remote_code: bool = False
    """Run code shipped with the model. Needs `revision` for a hub name."""
    gradient_checkpointing: bool = False
    """Recompute activations during the update to save memory."""


class LoraPart(Part):
    """A trainable LoRA."""

    r: PositiveInt = 16
    """LoRA rank."""
    alpha: PositiveFloat = 32.0
    """LoRA alpha; the update is scaled by alpha / r."""
    targets: str | list[str] = "all-linear"
    """Module names to adapt, or `all-linear`."""
    dropout: Fraction = 0.0
    """LoRA dropout; anything above 0 makes old and new log-probs differ."""
    lora: dict[str, Any] = Field(default_factory=dict)
    """Further options of peft's LoraConfig (use_rslora, use_dora, layers_to_transform, ...)."""


class PolicyPart(LoraPart):
    """The trained adapter."""

    start: Literal["new", "continue"] = "new"
    """`new`: a fresh LoRA on the base. `continue`: a trainable copy of an existing adapter."""
    source: str | None = Field(None, alias="from")
    """Adapter to copy when `start` is `continue`."""

    @model_validator(mode="after")
    def _source_fits_start(self) -> Self:
        if self.start == "continue" and not self.source:
            raise ValueError("start: continue needs `from: path/to/adapter`")
        if self.start == "new" and self.source:
            raise ValueError("`from` is only used with start: continue; remove it or write start: continue")
        return self


class ValuePart(LoraPart):
    """The value function."""

    on: Literal["policy", "own", "none"] | None = None
    """`policy`: a head on the policy's trunk. `own`: an adapter of its own. `none`. Default: policy for gae, else none."""
    learning_rate: PositiveFloat | None = None
    """Learning rate of head and own adapter; `ppo.learning_rate` when absent."""


class DataPart(Part):
    """The prompts."""

    prompts: str = Field(min_length=1)
    """A .json, .jsonl, .csv or .parquet file, or a datasets name."""
    split: str = "train"
    """Split, for a datasets name."""
    field: str = "prompt"
    """Column with the prompt: a text, or a list of chat messages."""
    max_prompt_tokens: PositiveInt = 512
    """Longest prompt allowed, in tokens."""
    on_long: Literal["error", "drop", "truncate-left"] = "error"
    """What to do with a longer prompt."""
    on_empty: Literal["error", "drop"] = "error"
    """What to do with an empty prompt."""
    shuffle: bool = True
    """New order each epoch, from the run's seed."""


class SamplingPart(Part):
    """How responses are sampled."""

    max_new_tokens: PositiveInt = 48
    """Longest response, in tokens."""
    min_new_tokens: NonNegativeInt = 0
    """No stop before this many tokens."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; all log-probs use it too."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling. Below 1 the sampled distribution is not the scored one."""
    top_k: NonNegativeInt = 0
    """Top-k sampling, 0 is off. Above 0 the sampled distribution is not the scored one."""
    stop: list[str] = Field(default_factory=list)
    """Further stop tokens beside the tokenizer's EOS; each must be a single token."""

    @model_validator(mode="after")
    def _min_fits_max(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}")
        return self


class KLPart(Part):
    """The KL penalty to the reference."""

    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimator (Schulman 2020)."""
    into: Literal["reward", "loss"] = "reward"
    """Subtract it from the token rewards, or add it to the loss."""
    coef: NonNegativeFloat = 0.05
    """Coefficient (start value when adaptive). 0 skips the reference pass."""
    target: PositiveFloat | None = None
    """Target KL in nats per response: makes the coefficient adaptive (Ziegler et al. 2019)."""
    horizon: PositiveFloat = 10_000.0
    """Responses over which the adaptive coefficient may change by a factor e^0.2."""

    @model_validator(mode="after")
    def _adaptive_needs_a_start(self) -> Self:
        if self.target is not None and self.coef == 0:
            raise ValueError("an adaptive coefficient (target) can't start from coef 0: it would stay 0")
        if self.into == "loss" and self.estimator == "k1":
            raise ValueError("k1 in the loss has zero expected gradient of the KL; use estimator k2 or k3 with into: loss")
        return self


class ClipPart(Part):
    """Clip range of the ratio: [1 - low, 1 + high]."""

    low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Range below 1."""
    high: PositiveFloat = 0.2
    """Range above 1."""


def _clip_from_number(value: Any) -> Any:
    if isinstance(value, float | int) and not isinstance(value, bool):
        return {"low": value, "high": value}
    return value


class PPOPart(Part):
    """The algorithm."""

    steps: PositiveInt = 50
    """PPO iterations: rollout, scoring, update."""
    batch: PositiveInt = 32
    """Responses per step."""
    samples_per_prompt: PositiveInt = 1
    """Responses per prompt; more than one for rloo and grpo."""
    minibatch: PositiveInt = 8
    """Responses per optimizer step."""
    microbatch: PositiveInt | None = None
    """Responses per forward and backward; gradients accumulate to a minibatch."""
    epochs: PositiveInt = 4
    """Passes over the rollout."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate of the policy adapter."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate schedule over all optimizer steps, after warm-up."""
    warmup_steps: NonNegativeInt = 0
    """PPO steps of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW weight decay."""
    adam_betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = Field(default_factory=lambda: [0.9, 0.999])
    """AdamW betas."""
    adam_eps: PositiveFloat = 1e-5
    """AdamW epsilon."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradient clipping, for each role by itself."""
    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    """Advantage estimator; rloo and grpo need no value function."""
    gamma: Fraction = 1.0
    """Discount."""
    lam: Fraction = 0.95
    """Lambda of generalized advantage estimation."""
    whiten: bool = True
    """Whiten advantages over the batch (gae)."""
    kl: KLPart = Field(default_factory=KLPart)
    clip: Annotated[ClipPart, BeforeValidator(_clip_from_number)] = Field(default_factory=ClipPart)
    """A number, or {low, high}."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """Bound of the loss for negative advantages (Ye et al. 2020)."""
    value_clip: PositiveFloat | None = 0.2
    """Clip range of the value update."""
    value_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    aggregation: Literal["token", "sequence"] = "token"
    """Mean over all tokens, or mean over sequences of token means."""
    max_kl: PositiveFloat | None = None
    """Stop the step's updates when approx_kl to the old policy passes this, in nats per token."""

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        pairs = (("batch", "minibatch"), ("batch", "samples_per_prompt"), ("minibatch", "microbatch"))
        for whole, piece in pairs:
            a, b = getattr(self, whole), getattr(self, piece)
            if b is not None and a % b:
                raise ValueError(f"{piece} {b} does not divide {whole} {a} (remainder {a % b})")
        if self.advantage in ("rloo", "grpo") and self.samples_per_prompt < 2:
            raise ValueError(f"advantage {self.advantage} compares responses to one prompt: samples_per_prompt must be 2 or more")
        return self


class ShapingPart(Part):
    """What happens to the summed scores before PPO sees them, in this order."""

    missing_eos_penalty: NonNegativeFloat | None = None
    """Subtracted from the score of a response that never stopped."""
    normalize: bool = False
    """Divide by the running standard deviation after subtracting the running mean."""
    clip: PositiveFloat | None = None
    """Clip to [-clip, clip]."""


class EvalPart(Part):
    """Evaluation on held-out prompts, before, during and after training."""

    prompts: str | None = None
    """Held-out prompts file; no evaluation when absent."""
    every: NonNegativeInt = 0
    """Evaluate every this many steps; 0: only before and after."""
    limit: PositiveInt | None = None
    """Use only the first prompts."""
    seeds: PositiveInt = 1
    """Sampling seeds; the spread over them is reported."""
    judges: dict[str, RewardChoice] = Field(default_factory=dict)
    """Further scores that are measured and never trained on."""
    samples: NonNegativeInt = 3
    """Responses kept with their texts."""


class RunPart(Part):
    """Where and how."""

    folder: str | None = None
    """Run folder; without one nothing is written."""
    seed: NonNegativeInt = 0
    """Seed of initialization, sampling and data order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the base lives."""
    threads: PositiveInt | None = None
    """CPU threads; torch's default when absent. Exact resume needs the same number."""
    checkpoint_every: NonNegativeInt = 0
    """Save every this many steps; 0: only at the end."""
    keep: PositiveInt = 2
    """Checkpoints kept."""


class RunConfig(Part):
    """One run. Sections are explained in docs/config.md."""

    model: ModelPart
    quantization: QuantizationChoice = Field(default_factory=lambda: QuantizationChoice(use="none"), validate_default=True)
    policy: PolicyPart = Field(default_factory=PolicyPart)
    reference: ReferenceChoice
    reward: list[RewardChoice] = Field(min_length=1)
    value: ValuePart = Field(default_factory=ValuePart)
    data: DataPart | None = None
    sampling: SamplingPart = Field(default_factory=SamplingPart)
    ppo: PPOPart = Field(default_factory=PPOPart)
    shaping: ShapingPart = Field(default_factory=ShapingPart)
    eval: EvalPart = Field(default_factory=EvalPart)
    observers: list[ObserverChoice] = Field(default_factory=list)
    run: RunPart = Field(default_factory=RunPart)

    @field_validator("reward", mode="wrap")
    @classmethod
    def _one_or_many(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        if isinstance(value, list):
            return handler(value)
        return [RewardChoice.model_validate(value, context=info.context)]

    @field_validator("value", mode="before")
    @classmethod
    def _value_from_name(cls, value: Any) -> Any:
        return {"on": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _value_fits_advantage(self) -> Self:
        critic_free = self.ppo.advantage != "gae"
        if self.value.on == "none" and not critic_free:
            raise ValueError("value: none with ppo.advantage gae: GAE needs a value function; use value: policy, or advantage rloo")
        if self.value.on in ("policy", "own") and critic_free:
            raise ValueError(f"value: {self.value.on} is never used with ppo.advantage {self.ppo.advantage}; write value: none")
        return self

    @property
    def value_on(self) -> Literal["policy", "own", "none"]:
        """Where the value function lives, the default resolved."""
        return self.value.on or ("policy" if self.ppo.advantage == "gae" else "none")
