"""The algorithm's sections: PPO, its KL penalty and clip range, and the shaping of scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias, Unpack

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from marl_core.config.choice import Choice
from marl_core.config.section import FROM_FAMILY_RECORD, Section, UnitInterval

if TYPE_CHECKING:
    from marl_core.config.keys import PPOKeys

KLKind: TypeAlias = Literal["k1", "k2", "k3"]
"""Per-token estimators of the KL: see `marl_core.ppo.kl_estimate`."""


class KLSection(Section, at="ppo.kl"):
    """The KL penalty to the reference."""

    estimator: KLKind = "k1"
    """Per-token estimator (Schulman 2020)."""
    into: Literal["reward", "loss"] = "reward"
    """Subtract it from the token rewards, or add it to the loss."""
    coef: NonNegativeFloat = 0.2
    """Coefficient (start value when adaptive). 0 skips the reference pass."""
    target: PositiveFloat | None = None
    """Target KL in nats per response: makes the coefficient adaptive (Ziegler et al. 2019)."""
    horizon: PositiveFloat = 10_000.0
    """Responses over which the adaptive coefficient may change by a factor e^0.2."""

    @model_validator(mode="after")
    def _adaptive_needs_a_start(self) -> Self:
        if self.target is not None and self.coef == 0:
            raise ValueError("an adaptive coefficient (target) can't start from coef 0: it would stay 0")
        return self


class ClipSection(Section, at="ppo.clip"):
    """Clip range of the ratio: [1 - low, 1 + high]."""

    low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Range below 1."""
    high: PositiveFloat = 0.2
    """Range above 1."""

    @classmethod
    def long_form(cls, value: Any) -> Any:
        """One number is both sides."""
        if isinstance(value, float | int) and not isinstance(value, bool):
            return {"low": value, "high": value}
        return value


class PPOSection(Section, at="ppo"):
    """The algorithm."""

    if TYPE_CHECKING:

        def __init__(self, **keys: Unpack[PPOKeys]) -> None:
            """The keys of a file, strategies as names, objects or dicts."""

    steps: PositiveInt = 50
    """PPO iterations: rollout, scoring, update."""
    batch: PositiveInt = 32
    """Responses per step."""
    samples_per_prompt: PositiveInt = 1
    """Responses per prompt; more than one for an estimator that compares them."""
    minibatch: PositiveInt = 8
    """Responses per optimizer step."""
    microbatch: PositiveInt | None = None
    """Responses per forward and backward; gradients accumulate to a minibatch."""
    epochs: PositiveInt = 4
    """Passes over the rollout."""
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate of the policy adapter."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate schedule over all PPO steps, after warm-up."""
    warmup_steps: NonNegativeInt = 0
    """PPO steps of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW weight decay."""
    adam_betas: Annotated[list[Annotated[float, Field(ge=0.0, lt=1.0)]], Field(min_length=2, max_length=2)] = Field(
        default_factory=lambda: [0.9, 0.999]
    )
    """AdamW betas."""
    adam_eps: PositiveFloat = 1e-5
    """AdamW epsilon."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradient clipping, for each role by itself."""
    advantage: Choice = FROM_FAMILY_RECORD
    gamma: UnitInterval = 1.0
    """Discount."""
    lam: UnitInterval = 0.95
    """Lambda of generalized advantage estimation."""
    whiten: bool = True
    """Whiten advantages over the batch, where the estimator can."""
    kl: KLSection = Field(default_factory=KLSection)
    """Penalty for leaving the reference."""
    clip: Annotated[ClipSection, BeforeValidator(ClipSection.long_form, json_schema_input_type=ClipSection | float)] = (
        Field(default_factory=ClipSection)
    )
    """A number, or {low, high}."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """Bound of the loss for negative advantages (Ye et al. 2020)."""
    value_clip: PositiveFloat | None = 0.2
    """Clip range of the value update."""
    value_coef: NonNegativeFloat = 0.1
    """Weight of the value loss beside the policy's, for value: policy; an adapter of its own has its own loss."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    aggregation: Literal["token", "sequence"] = "token"
    """Mean over all tokens, or mean over sequences of token means."""
    max_kl: PositiveFloat | None = None
    """Stop the step's updates when approx_kl to the old policy passes this, in nats per token."""

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        pairs = (("batch", "minibatch"), ("batch", "samples_per_prompt"), ("minibatch", "microbatch"))
        for larger, smaller in pairs:
            a, b = getattr(self, larger), getattr(self, smaller)
            if b is not None and a % b:
                raise ValueError(f"{smaller} {b} does not divide {larger} {a} (remainder {a % b})")
        if self.kl.target is not None and self.kl.horizon <= 0.2 * self.batch:
            raise ValueError(
                f"kl.horizon {self.kl.horizon:g} is too short for batch {self.batch}: the adaptive coefficient could turn "
                f"negative; use more than {0.2 * self.batch:g}"
            )
        return self


class ShapingSection(Section, at="shaping"):
    """What happens to the summed scores before PPO sees them, in this order."""

    missing_eos_penalty: NonNegativeFloat | None = None
    """Subtracted from the score of a response that never stopped."""
    normalize: bool = False
    """Divide by the running standard deviation after subtracting the running mean."""
    clip: PositiveFloat | None = None
    """Clip to [-clip, clip]."""
