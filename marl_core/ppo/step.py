"""One PPO step: sample, score, advantages, update. Whoever needs a part of it holds the same object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.views import View
from marl_core.config.run_config import PPOSection
from marl_core.ppo.budget import Budget, PassLimits
from marl_core.ppo.data_parallel import sample_sharded, score_sharded
from marl_core.ppo.estimators import estimate_advantages
from marl_core.ppo.policy_output import PolicyOutput
from marl_core.ppo.progress import phase
from marl_core.ppo.ranks import ONE_PROCESS, Ranks
from marl_core.ppo.reward_context import asking, logged, reward_context
from marl_core.ppo.rewards import judge_all, own_scores, score_all
from marl_core.ppo.roles import Roles
from marl_core.ppo.sampling.sampler import Sampler
from marl_core.ppo.scoring import reference_logprobs, require_fit, view_output, view_values
from marl_core.ppo.token_scores import Scores
from marl_core.ppo.types import Advantages, Prompts, Rollout, ScoredRollout, UpdateStats
from marl_core.ppo.update import TrainingBatch, Update
from marl_core.registry.strategy import Estimator


@dataclass(frozen=True, slots=True)
class RoleOutputs:
    """What the models say of a rollout's tokens: the policy, with the values, and the reference [B, T] if it is asked."""

    policy: PolicyOutput
    ref_logprobs: Tensor | None


@dataclass(frozen=True, slots=True)
class Step:
    """Everything one PPO step needs, and nothing that it changes but the weights that learn."""

    bank: AdapterBank
    roles: Roles
    sampler: Sampler
    budget: Budget
    estimator: Estimator
    ppo: PPOSection
    temperature: float
    ranks: Ranks = ONE_PROCESS

    def sample(self, prompts: Prompts, seed: int, limits: Tensor | None = None, samples: int | None = None) -> Rollout:
        """`ppo.samples_per_prompt` responses (or `samples`) to each of n prompts, one below the other, shared out over the ranks.

        limits [n * samples] int64: most tokens of each response.
        """
        per_prompt = self.ppo.samples_per_prompt if samples is None else samples
        with phase("sampling"):
            return sample_sharded(self.ranks, self.sampler, prompts, seed, per_prompt, limits)

    def score(self, rollout: Rollout, scores: Tensor | Sequence[float] | None = None) -> ScoredRollout:
        """Score a rollout by every role, the passes shared out over the ranks; `scores` of one's own, [B] or [B, T], replace the reward.

        Nothing is shaped here: `shaped_scores` equal `scores`. DataError for tokens or lengths that the base doesn't have.
        """
        rollout = rollout.to(self.bank.device)
        require_fit(self.bank, rollout)
        with phase("scoring"):
            models = score_sharded(self.ranks, rollout, self.ppo.minibatch, self.role_outputs)
            with asking(reward_context().fresh()) as context:
                reward_scores = self._sharded_rewards(rollout) if scores is None else own_scores(scores, rollout)
        parts = self.ranks.all_gather_object(context.part()) if scores is None else []
        return ScoredRollout(
            rollout,
            logprobs=models.policy.logprobs,
            ref_logprobs=models.ref_logprobs,
            values=models.policy.values,
            scores=reward_scores.total,
            parts=reward_scores.parts,
            entropy=models.policy.entropy,
            token_scores=reward_scores.tokens,
            logged=logged(parts, [len(rollout) // self.ranks.size] * len(parts)),
        )

    def advantages(self, scored: ScoredRollout, kl_coef: float) -> Advantages:
        """What the update learns from: KL, token rewards, advantages, and returns where there are values."""
        return estimate_advantages(scored, self.ppo, kl_coef, self.estimator)

    def update(
        self,
        scored: ScoredRollout,
        advantages: Advantages,
        optimizer: torch.optim.Optimizer,
        kl_coef: float,
        generator: torch.Generator,
    ) -> UpdateStats:
        """Train policy and value on a scored rollout; `generator` orders the minibatches of all epochs but the first.

        NumericError when a loss or a gradient isn't finite: the optimizer isn't stepped with it.
        """
        update = Update(
            bank=self.bank,
            trained=self.roles.trained,
            ppo=self.ppo,
            temperature=self.temperature,
            limits=self.budget.train,
            ranks=self.ranks,
            optimizer=optimizer,
            kl_coef=kl_coef,
        )
        with phase("update"):
            return update.run(TrainingBatch(scored, advantages), generator)

    # -- the parts of scoring, of this rank's rows ------------------------------------------------------------

    def role_outputs(self, rollout: Rollout) -> RoleOutputs:
        """Policy, value and reference of each token; the reference is asked only where `ppo.kl.coef` isn't 0."""
        trained, limits = self.roles.trained, self.budget.train
        policy = self.policy_output(rollout, limits, entropy=True)
        if trained.value_adapter and trained.value_head:
            home = trained.value_home(self.bank)
            with phase("value"):
                values = view_values(home, trained.value_adapter, trained.value_head, rollout, limits)
            policy = replace(policy, values=values)
        return RoleOutputs(policy, self.ref_logprobs(rollout, limits))

    def policy_output(self, rollout: Rollout, limits: PassLimits, *, entropy: bool = False) -> PolicyOutput:
        """The policy's log-probs, entropy and values [B, T].

        They are the sampling pass's where that saw these tokens with the same weights; else a new pass gives them.
        """
        trained, behavior = self.roles.trained, rollout.behavior
        origin = (self.bank, trained.policy, trained.policy_head, self.temperature)
        if behavior is not None and behavior.is_of(*origin, rollout.digests()):
            return PolicyOutput(behavior.logprobs, behavior.entropy, behavior.values)
        view = View(trained.policy)
        with phase("policy"):
            return view_output(
                self.bank, view, rollout, self.temperature, limits, value_head=trained.policy_head, entropy=entropy
            )

    def ref_logprobs(self, rollout: Rollout, limits: PassLimits) -> Tensor | None:
        """The reference's log-probs [B, T]; None where `ppo.kl.coef` is 0."""
        if self.ppo.kl.coef == 0:
            return None
        roles, temperature = self.roles, self.temperature
        with phase("reference"):
            return reference_logprobs(self.bank, roles.reference, rollout, temperature, limits, roles.reference_origin)

    def rewards(self, rollout: Rollout) -> Scores:
        """The configured sources' scores of these rows."""
        return score_all(self.bank, self.roles.rewards, rollout, self.budget.inference)

    def _sharded_rewards(self, rollout: Rollout) -> Scores:
        return score_sharded(self.ranks, rollout, len(rollout), self._rewards_of_one_shape)

    def _rewards_of_one_shape(self, rollout: Rollout) -> Scores:
        """This rank's rewards, with token scores on every rank or on none, so that all ranks gather the same tensors.

        A source may have abstained from all of one rank's part and scored tokens of another's.
        """
        scores = self.rewards(rollout)
        by_token = torch.full((len(rollout),), float(scores.tokens is not None), device=rollout.mask.device)
        if bool(self.ranks.gather(by_token).any()) and scores.tokens is None:
            return replace(scores, tokens=torch.zeros_like(rollout.mask, dtype=torch.float32))
        return scores

    def judge(self, rollout: Rollout) -> dict[str, Tensor]:
        """The judges' scores [B] of these rows, NaN where one abstained."""
        return judge_all(self.bank, self.roles.judges, rollout, self.budget.inference)
