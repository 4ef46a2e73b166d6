"""ScoredRollout -> Advantages: the KL penalty, the token rewards, and the estimator that was chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from marl_core.config.choice import Choice, choice_of
from marl_core.config.run_config import PPOSection
from marl_core.errors import ConfigError, PluginError
from marl_core.plan.estimator_checks import nothing_to_compare
from marl_core.ppo.objectives import kl_estimate, token_rewards
from marl_core.ppo.types import Advantages, ScoredRollout
from marl_core.registry.families import FAMILIES
from marl_core.registry.hooks import Hooks
from marl_core.registry.strategy import AdvantageInputs, Estimator


def estimate_advantages(
    scored: ScoredRollout, ppo: PPOSection, kl_coef: float | None = None, estimator: Estimator | None = None
) -> Advantages:
    """Advantages of one rollout; `kl_coef` replaces the configured coefficient when it is adaptive.

    The result's tensors are [B, T] float32, 0 where the rollout's mask is false. `estimator` is a plan's (`plan.estimator`); without it
    the one that `ppo.advantage` names is looked up among the installed ones. Raises ConfigError when the rollout lacks values or
    complete groups that the estimator needs; PluginError naming the estimator when it fails, or gives anything but finite
    advantages (and returns) of the right shape.
    """
    choice = _choice(ppo)
    estimator = estimator or _installed(choice)
    mask = scored.rollout.mask
    coef = ppo.kl.coef if kl_coef is None else kl_coef
    into_reward = coef if ppo.kl.into == "reward" else 0.0
    kl = torch.zeros_like(scored.logprobs)
    if scored.ref_logprobs is not None:
        kl = kl_estimate(scored.logprobs, scored.ref_logprobs, ppo.kl.estimator).masked_fill(~mask, 0.0)
    rewards = token_rewards(scored.shaped_scores, kl, mask, into_reward, scored.token_scores)
    _require(estimator, choice.label, scored, ppo)
    inputs = _inputs(estimator, rewards, scored, ppo)
    with torch.no_grad():
        result = estimator.estimate(inputs)
    advantages, returns = _checked(result, estimator, estimator.origin or choice.label, rewards, scored)
    return Advantages(kl, rewards, advantages, returns)


def _choice(ppo: PPOSection) -> Choice:
    """`ppo.advantage`; a section that was copied with another name holds just that name."""
    choice_class, choice = choice_of(FAMILIES["advantage"]), ppo.advantage
    return choice if isinstance(choice, choice_class) else choice_class.model_validate(choice)


def _installed(choice: Choice) -> Estimator:
    strategy = choice.resolve()
    return Hooks([(strategy, choice.origin)]).advantage(strategy)


def _require(estimator: Estimator, label: str, scored: ScoredRollout, ppo: PPOSection) -> None:
    """ConfigError when the rollout lacks what the estimator needs."""
    if estimator.needs_values and scored.values is None:
        raise ConfigError(
            f"advantage {label} needs values; score with a value function, or choose an estimator that needs none (marl plugins "
            "--family advantage)."
        )
    problem = nothing_to_compare(estimator, label, ppo.samples_per_prompt)
    if problem is not None:
        raise ConfigError(f"{problem}.")
    count = len(scored.scores)
    if estimator.needs_groups and count % ppo.samples_per_prompt:
        raise ConfigError(
            f"advantage {label}: {count} responses can't be grouped by samples_per_prompt {ppo.samples_per_prompt}; give each "
            "prompt's responses one after the other, the same number for each."
        )


def _inputs(estimator: Estimator, rewards: Tensor, scored: ScoredRollout, ppo: PPOSection) -> AdvantageInputs:
    """Copies, for an estimator may write where it reads, and metrics and the update read the originals."""
    mask = scored.rollout.mask
    values = scored.values.masked_fill(~mask, 0.0) if estimator.needs_values and scored.values is not None else None
    return AdvantageInputs(
        rewards=rewards.clone(),
        mask=mask.clone(),
        values=values,
        samples_per_prompt=ppo.samples_per_prompt,
        gamma=ppo.gamma,
        lam=ppo.lam,
        whiten=ppo.whiten,
    )


def _checked(
    result: object, estimator: Estimator, origin: str, rewards: Tensor, scored: ScoredRollout
) -> tuple[Tensor, Tensor | None]:
    """Advantages and returns [B, T] float32, 0 where the mask is false; PluginError naming who gave something else."""
    mask = scored.rollout.mask
    inputs_are_finite = _finite(rewards, mask) and (scored.values is None or _finite(scored.values, mask))
    if not estimator.needs_values:
        return _per_token(result, "advantages", origin, mask, inputs_are_finite, per_response=True), None
    if not isinstance(result, tuple) or len(result) != 2:
        raise _wrong_result(
            origin, f"gave {_type_text(result)}, expected a pair, advantages and returns, for it needs values"
        )
    advantages, returns = result
    return (
        _per_token(advantages, "advantages", origin, mask, inputs_are_finite, per_response=True),
        _per_token(returns, "returns", origin, mask, inputs_are_finite),
    )


def _per_token(
    result: object, what: str, origin: str, mask: Tensor, inputs_are_finite: bool, per_response: bool = False
) -> Tensor:
    """`result` as a tensor [B, T] beside the mask; with `per_response` a number for each response will do."""
    expected = f"{list(mask.shape)}" + (f" or [{len(mask)}]" if per_response else "")
    if not isinstance(result, Tensor) or not result.is_floating_point():
        raise _wrong_result(origin, f"gave {_type_text(result)} as {what}, expected a floating tensor {expected}")
    if per_response and result.shape == mask.shape[:1]:
        result = result[:, None].expand(mask.shape)
    if result.shape != mask.shape:
        raise _wrong_result(origin, f"gave {what} of shape {list(result.shape)}, expected {expected}")
    result = result.detach().to(mask.device, torch.float32)
    if inputs_are_finite and not _finite(result, mask):
        rows = (~result.isfinite() & mask).any(dim=1).nonzero().flatten().tolist()
        numbers = ", ".join(str(row + 1) for row in rows[:8])
        raise _wrong_result(origin, f"gave {what} that aren't finite, from finite rewards (response {numbers})")
    return torch.where(mask, result, torch.zeros_like(result))


def _finite(values: Tensor, mask: Tensor) -> bool:
    return bool((values.isfinite() | ~mask).all())


def _type_text(result: object) -> str:
    if result is None:
        return "None"
    if isinstance(result, Tensor):
        return f"a tensor of {str(result.dtype).removeprefix('torch.')}"
    return f"a {type(result).__name__}" + (f" of {len(result)}" if isinstance(result, tuple) else "")


def _wrong_result(origin: str, problem: str) -> PluginError:
    return PluginError(
        f"advantage: {origin} {problem}. Report it to its authors; docs/plugins.md says what an estimator gives."
    )
