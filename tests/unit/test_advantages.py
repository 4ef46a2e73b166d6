"""From scores to advantages: where the KL goes, what each estimator sees, worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from marl_core import ConfigError, ScoredRollout
from marl_core.config.run_config import PPOSection
from marl_core.ppo.estimators import estimate_advantages
from marl_core.ppo.objectives import generalized_advantage_estimation, masked_whiten
from marl_core.testing import fake_rollout

# Two prompts, two responses each, of 3, 2, 1 and 3 tokens (the last response has no EOS).
ROLLOUT = fake_rollout([("a", "xy"), ("a", "x"), ("b", ""), ("b", "xyz")])
MASK = ROLLOUT.mask
SCORES = torch.tensor([4.0, 2.0, 1.0, -1.0])


def scored(log_ratio: Tensor | None = None, values: Tensor | None = None) -> ScoredRollout:
    """Policy log-probs -1 everywhere; the reference is `log_ratio` below."""
    logprobs = torch.full(MASK.shape, -1.0).masked_fill(~MASK, 0.0)
    reference = None if log_ratio is None else (logprobs - log_ratio).masked_fill(~MASK, 0.0)
    return ScoredRollout(ROLLOUT, logprobs, reference, values, SCORES)


def ppo(**options: Any) -> PPOSection:
    return PPOSection.model_validate({"batch": 4, "minibatch": 4, **options})


def test_the_rollout_is_what_the_tables_below_assume() -> None:
    assert ROLLOUT.lengths.tolist() == [3, 2, 1, 3]


class TestGAE:
    values = torch.full(MASK.shape, 0.5).masked_fill(~MASK, 0.0)

    def test_rewards_advantages_and_returns(self) -> None:
        # k1 = 0.2 a token, coefficient 0.5: -0.1 a token, and the score on the last
        found = estimate_advantages(
            scored(torch.full(MASK.shape, 0.2), self.values), ppo(whiten=False, kl={"coef": 0.5})
        )
        torch.testing.assert_close(found.kl, torch.full(MASK.shape, 0.2).masked_fill(~MASK, 0.0))
        expected = torch.tensor([[-0.1, -0.1, 3.9], [-0.1, 1.9, 0.0], [0.9, 0.0, 0.0], [-0.1, -0.1, -1.1]])
        torch.testing.assert_close(found.rewards, expected)
        advantages, returns = generalized_advantage_estimation(expected, self.values, MASK, 1.0, 0.95)
        torch.testing.assert_close(found.advantages, advantages)
        torch.testing.assert_close(found.returns, returns)
        # Response 2 is one token: A = 0.9 - 0.5
        assert found.advantages[2].tolist() == pytest.approx([0.4, 0, 0])

    def test_gamma_and_lam_arrive(self) -> None:
        one = estimate_advantages(scored(None, self.values), ppo(whiten=False, gamma=0.5, lam=0.25))
        advantages, _ = generalized_advantage_estimation(one.rewards, self.values, MASK, 0.5, 0.25)
        torch.testing.assert_close(one.advantages, advantages)

    def test_whitening_is_of_advantages_not_of_returns(self) -> None:
        plain = estimate_advantages(scored(None, self.values), ppo(whiten=False))
        white = estimate_advantages(scored(None, self.values), ppo(whiten=True))
        torch.testing.assert_close(white.advantages, masked_whiten(plain.advantages, MASK))
        assert white.returns is not None
        assert plain.returns is not None
        assert torch.equal(white.returns, plain.returns)

    def test_values_are_needed(self) -> None:
        with pytest.raises(ConfigError, match="gae needs values"):
            estimate_advantages(scored(), ppo())


class TestCriticFree:
    def test_rloo_by_hand(self) -> None:
        # groups (4, 2) and (1, -1): +2, -2, +2, -2 for every token of the response
        found = estimate_advantages(scored(), ppo(advantage="rloo", samples_per_prompt=2))
        assert torch.equal(found.advantages, torch.tensor([[2.0], [-2.0], [2.0], [-2.0]]) * MASK)
        assert found.returns is None

    def test_the_penalty_of_the_whole_response_counts(self) -> None:
        # k1 = 1 a token, coefficient 1: totals 4-3, 2-2, 1-1, -1-3: groups (1, 0) and (0, -4)
        found = estimate_advantages(
            scored(torch.ones(MASK.shape)), ppo(advantage="rloo", samples_per_prompt=2, kl={"coef": 1.0})
        )
        assert torch.equal(found.advantages, torch.tensor([[1.0], [-1.0], [4.0], [-4.0]]) * MASK)

    def test_grpo_by_hand(self) -> None:
        # both groups are mean +- 1, std sqrt(2): 1 / (1.41421356 + 1e-4) = 0.70705678
        found = estimate_advantages(scored(), ppo(advantage="grpo", samples_per_prompt=2))
        torch.testing.assert_close(found.advantages, 0.70705678 * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]) * MASK)

    def test_groups_must_be_whole(self) -> None:
        with pytest.raises(ConfigError, match=r"4 responses can't be grouped by samples_per_prompt 3"):
            estimate_advantages(scored(), ppo(advantage="rloo", samples_per_prompt=3, batch=6, minibatch=6))


class TestKL:
    def test_in_the_loss_it_is_not_in_the_rewards(self) -> None:
        options = {"advantage": "rloo", "samples_per_prompt": 2, "kl": {"coef": 1.0, "into": "loss", "estimator": "k3"}}
        found = estimate_advantages(scored(torch.ones(MASK.shape)), ppo(**options))
        assert float(found.rewards.sum()) == pytest.approx(float(SCORES.sum()))
        assert found.kl[MASK].tolist() == pytest.approx([0.3678794] * 9)  # r = e^-1: e^-1 - 1 + 1

    def test_the_adaptive_coefficient_replaces_the_configured_one(self) -> None:
        found = estimate_advantages(
            scored(torch.ones(MASK.shape), torch.zeros(MASK.shape)), ppo(kl={"coef": 0.5}), kl_coef=2.0
        )
        assert found.rewards[0].tolist() == [-2.0, -2.0, 2.0]

    def test_without_a_reference_it_is_zero(self) -> None:
        found = estimate_advantages(scored(None, torch.zeros(MASK.shape)), ppo(kl={"coef": 0.0}))
        assert torch.count_nonzero(found.kl) == 0

    def test_garbage_under_the_mask_changes_nothing(self) -> None:
        good = scored(torch.ones(MASK.shape), torch.zeros(MASK.shape))
        dirty = [
            t.masked_fill(~MASK, float("nan")) for t in (good.logprobs, good.ref_logprobs, good.values) if t is not None
        ]
        expected = estimate_advantages(good, ppo())
        found = estimate_advantages(ScoredRollout(ROLLOUT, dirty[0], dirty[1], dirty[2], SCORES), ppo())
        for name in ("kl", "rewards", "advantages", "returns"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
