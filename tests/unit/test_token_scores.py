"""Scores for tokens: what may be given, what they add up to, and where they land."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from marl_core import AdapterBank, DataError, PluginError, Rollout, ScoredRollout
from marl_core.config.run_config import ShapingSection
from marl_core.ppo.budget import PassLimits
from marl_core.ppo.objectives import generalized_advantage_estimation, masked_sum, token_rewards
from marl_core.ppo.rewards import as_scores, own_scores, score_all
from marl_core.ppo.roles import RewardSource
from marl_core.ppo.shaping import RewardStats, learned, shape
from marl_core.testing import fake_rollout, tiny_bank


@pytest.fixture(scope="module")
def bank() -> AdapterBank:
    return tiny_bank()


@pytest.fixture
def rollout() -> Rollout:
    """Responses of 3, 2 and 1 tokens: two letters and EOS, one and EOS, one alone."""
    return fake_rollout([("a", "xy"), ("b", "z"), ("c", "w")])


def source(give: Any, name: str = "r", weight: float = 1.0) -> RewardSource:
    return RewardSource(name, weight, lambda rollout: give)


class TestWhatMayBeGiven:
    def test_a_tensor_whatever_stands_under_the_mask(self, rollout: Rollout) -> None:
        given = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, math.nan], [6.0, math.inf, -1.0]])
        assert as_scores(given, rollout, "who").tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 0.0], [6.0, 0.0, 0.0]]

    def test_a_list_for_each_response_and_none(self, rollout: Rollout) -> None:
        found = as_scores([[1, 2.5, 3], None, [torch.tensor([6.0]).numpy()[0]]], rollout, "who")
        assert found[0].tolist() == [1.0, 2.5, 3.0]
        assert bool(found[1].isnan().all())
        assert found[2].tolist() == [6.0, 0.0, 0.0]

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (torch.zeros(3, 2), "response 1 has 3 tokens and got 2 numbers; give one for each token"),
            (torch.full((3, 3), math.nan), "token 1 of response 1 got nan"),
            (torch.tensor([[0.0, 0, 0], [0, math.inf, 0], [0, 0, 0]]), "token 2 of response 2 got inf"),
            ([[1.0, 2.0, 3.0], [1.0]], "gave 2 rewards for 3 responses"),
            ([[1.0, 2.0, 3.0], [1.0], [1.0]], "response 2 has 2 tokens and got 1 numbers"),
            ([[1.0, 2.0, 3.0], 1.0, [1.0]], "response 2 has 2 tokens and got one number"),
            ([[1.0, 2.0, "3"], [1.0, 2.0], [1.0]], "token 3 of response 1 got '3', not a finite number"),
            ([[1.0, 2.0, math.nan], [1.0, 2.0], [1.0]], "token 3 of response 1 got nan"),
        ],
    )
    def test_anything_else_is_refused(self, rollout: Rollout, bad: Any, message: str) -> None:
        with pytest.raises(PluginError, match=message):
            as_scores(bad, rollout, "who")


class TestWhatTheyAddUpTo:
    def test_beside_a_score_for_the_whole(self, bank: AdapterBank, rollout: Rollout) -> None:
        tokens, whole = [[1.0, 2.0, 3.0], None, [5.0]], [10.0, 20.0, None]
        found = score_all(bank, [source(tokens, "steps", 0.5), source(whole, "whole", 2.0)], rollout, PassLimits(2))
        assert found.total.tolist() == [3.0 + 20.0, 40.0, 2.5]
        assert found.tokens is not None
        assert found.tokens.tolist() == [[0.5, 1.0, 1.5], [0.0, 0.0, 0.0], [2.5, 0.0, 0.0]]
        assert found.parts["steps"].isnan().tolist() == [False, True, False]
        assert found.parts["steps"][0] == 6.0

    def test_somebody_must_judge_each_response(self, bank: AdapterBank, rollout: Rollout) -> None:
        with pytest.raises(PluginError, match=r"no source .* gave response 2 a score"):
            score_all(bank, [source([[1.0, 2.0, 3.0], None, [5.0]])], rollout, PassLimits(2))

    def test_without_them_there_are_none(self, bank: AdapterBank, rollout: Rollout) -> None:
        assert score_all(bank, [source([1.0, 2.0, 3.0])], rollout, PassLimits(2)).tokens is None

    def test_ones_own(self, rollout: Rollout) -> None:
        found = own_scores([[1.0, 2.0, 3.0], [4.0, 5.0], [6.0]], rollout)
        assert found.total.tolist() == [6.0, 9.0, 6.0]
        with pytest.raises(DataError, match="None isn't allowed; give a number"):
            own_scores([[1.0, 2.0, 3.0], None, [6.0]], rollout)


class TestWhereTheyLand:
    mask = torch.tensor([[True, True, True], [True, True, False]])
    kl = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, math.nan]])
    steps = torch.tensor([[1.0, 0.0, 2.0], [0.0, -1.0, math.nan]])

    def test_on_their_tokens_and_the_rest_on_the_last(self) -> None:
        rewards = token_rewards(torch.tensor([5.0, 1.0]), self.kl, self.mask, 1.0, self.steps)
        expected = torch.tensor([[1.0 - 0.1, -0.2, 2.0 - 0.3 + 2.0], [-0.4, -1.0 - 0.5 + 2.0, 0.0]])
        torch.testing.assert_close(rewards, expected)

    def test_the_sum_is_the_score_less_the_penalty(self) -> None:
        scores = torch.tensor([5.0, 1.0])
        rewards = token_rewards(scores, self.kl, self.mask, 0.3, self.steps)
        torch.testing.assert_close(
            masked_sum(rewards, self.mask, dim=1), scores - 0.3 * masked_sum(self.kl, self.mask, dim=1)
        )

    def test_all_on_the_last_token_is_the_ordinary_reward(self) -> None:
        scores = torch.tensor([3.0, -2.0])
        at_end = torch.zeros(2, 3)
        at_end[0, 2], at_end[1, 1] = 3.0, -2.0
        plain = token_rewards(scores, self.kl, self.mask, 0.5)
        assert torch.equal(token_rewards(scores, self.kl, self.mask, 0.5, at_end), plain)

    def test_an_early_score_moves_only_what_came_before(self) -> None:
        """With gamma = lam = 1 and V = 0 the return at t is what lands from t on."""
        mask, zero = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4)
        rewards = token_rewards(torch.tensor([1.0]), zero, mask, 0.0, torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
        advantages, _ = generalized_advantage_estimation(rewards, zero, mask, 1.0, 1.0)
        assert advantages.tolist() == [[1.0, 1.0, 0.0, 0.0]]


class TestShaping:
    def shaped(self, part: ShapingSection, tokens: Tensor | None) -> tuple[RewardStats, ScoredRollout]:
        """The moments with this batch, and the batch shaped by them."""
        rollout = replace(fake_rollout([("a", "x"), ("b", "y")]), finished=torch.tensor([True, False]))
        scores = torch.tensor([1.0, 3.0]) if tokens is None else tokens.sum(dim=1)
        scored = ScoredRollout(rollout, torch.zeros(rollout.ids.shape), None, None, scores, token_scores=tokens)
        return learned(RewardStats(), scores, rollout.finished, part), shape(scored, part, RewardStats())

    def test_normalization_scales_them_too(self) -> None:
        tokens = torch.tensor([[1.0, 3.0], [0.0, 10.0]])
        stats, found = self.shaped(ShapingSection(normalize=True), tokens)
        assert found.token_scores is not None
        torch.testing.assert_close(found.token_scores * stats.std, tokens)
        assert stats.std > 1

    def test_without_it_they_stay(self) -> None:
        tokens = torch.tensor([[1.0, 3.0], [0.0, 10.0]])
        _, found = self.shaped(ShapingSection(missing_eos_penalty=2.0, clip=5.0), tokens)
        assert found.token_scores is not None
        assert torch.equal(found.token_scores, tokens)
        assert found.shaped_scores.tolist() == [4.0, 5.0]

    def test_none_stays_none(self) -> None:
        assert self.shaped(ShapingSection(normalize=True), None)[1].token_scores is None
