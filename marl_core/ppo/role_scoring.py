"""A step's passes over the shared base, as the runner's roles say: the part of the rows that is this rank's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.views import View
from marl_core.config.run_config import RunConfig
from marl_core.config.speed_config import usual_tokens
from marl_core.ppo.data_parallel import score_in_shares
from marl_core.ppo.scoring import (
    WITHOUT_GRADIENT,
    captured,
    own_scores,
    reference_logprobs,
    score_all,
    view_logprobs,
    view_values,
)
from marl_core.ppo.token_scores import Scores
from marl_core.ppo.types import Rollout

if TYPE_CHECKING:
    from marl_core.run.runner import Runner


def model_numbers(runner: Runner, rollout: Rollout) -> dict[str, Tensor]:
    """What policy, value and reference say of each token, [B, T] each: logprobs, entropy, and values, reference if any."""
    bank, config, trained = runner.bank, runner.config, runner.roles.trained
    tokens = token_budget(config, bank)
    temperature, size = config.sampling.temperature, config.ppo.microbatch or config.ppo.minibatch // runner.ranks.size
    head = trained.value_head if trained.value_on_policy else None
    policy = captured(bank, trained.policy, rollout, temperature, head) or view_logprobs(
        bank, View(trained.policy), rollout, temperature, size, value_head=head, entropy=True, tokens=tokens
    )
    found = {"logprobs": policy.logprobs, "entropy": policy.entropy}
    if policy.values is not None:
        found["values"] = policy.values
    if trained.value_adapter and trained.value_head:
        found["values"] = view_values(bank, trained.value_adapter, trained.value_head, rollout, size, tokens)
    if config.ppo.kl.coef > 0:
        roles = runner.roles
        found["reference"] = reference_logprobs(
            bank, roles.reference, rollout, temperature, size, roles.reference_origin, tokens
        )
    return found


def token_budget(config: RunConfig, bank: AdapterBank) -> int | None:
    """Most tokens of one forward and backward; None where `ppo.microbatch` says it in rows.

    None too where the base's layers are spread over processes: every pass needs all ranks then, so each must make as many, whatever
    the lengths of its rows. Otherwise ranks meet at the sum of gradients alone.
    """
    if config.ppo.microbatch or bank.trunk.sharded:
        return None
    return config.speed.microbatch_tokens or usual_tokens(bank.device.type, config.model.dtype)


def score_budget(config: RunConfig, bank: AdapterBank) -> tuple[int, int | None]:
    """Most responses, and most tokens if limited, of a pass without gradient from which no ratio is taken."""
    tokens = token_budget(config, bank)
    rows = max(config.ppo.microbatch or config.ppo.minibatch, WITHOUT_GRADIENT)
    return rows, None if tokens is None else TIMES_WITHOUT_GRADIENT * tokens


TIMES_WITHOUT_GRADIENT = 4  # a pass that keeps nothing for backward may be larger


def rewards(runner: Runner, rollout: Rollout, own: object) -> Scores:
    """The scores of all responses: the configured sources', shared out over the ranks, or the caller's `own`."""
    if own is not None:
        return own_scores(own, rollout)

    def mine(part: Rollout) -> dict[str, Tensor]:
        size, tokens = score_budget(runner.config, runner.bank)
        found = score_all(runner.bank, runner.roles.rewards, part, size, tokens)
        # a source may have abstained from all of one rank's part and scored tokens of another's: all gather the same
        here = torch.full((len(part),), float(found.tokens is not None), device=part.mask.device)
        if not bool(runner.ranks.gather(here).any()):
            return {TOTAL: found.total, **found.parts}
        none = torch.zeros_like(part.mask, dtype=torch.float32)
        return {TOTAL: found.total, TOKENS: none if found.tokens is None else found.tokens, **found.parts}

    parts = dict(score_in_shares(runner.ranks, rollout, len(rollout), mine))
    return Scores(parts.pop(TOTAL), tokens=parts.pop(TOKENS, None), parts=parts)


TOTAL, TOKENS = "", " "  # no source can be called so
