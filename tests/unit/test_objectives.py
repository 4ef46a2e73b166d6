"""The mathematics of PPO against tables worked by hand, independent formulas, finite differences and properties."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from marl_core.ppo import (
    adapt_kl_coef,
    aggregate,
    explained_variance,
    generalized_advantage_estimation,
    group_advantages,
    kl_estimate,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    policy_loss,
    rloo_advantages,
    token_rewards,
    value_loss,
)

LN2 = math.log(2.0)
ALL = torch.ones(1, 3, dtype=torch.bool)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, check_dtype=False)


def random_case(seed: int, rows: int = 5, width: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a mask with ragged ends and holes, float64."""
    random = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, width, generator=random, dtype=torch.float64) * 5
    values = torch.randn(rows, width, generator=random, dtype=torch.float64) * 5
    mask = torch.rand(rows, width, generator=random) < 0.8
    mask[:, 0] = True
    lengths = torch.randint(1, width + 1, (rows, 1), generator=random)
    return rewards, values, mask & (torch.arange(width) < lengths)


class TestKL:
    """The policy gives three tokens 1/2, 1/4 and 1/4; the reference gives them 1/4, 1/2 and 1/4."""

    logprobs = row(-LN2, -2 * LN2, -2 * LN2)
    reference = row(-2 * LN2, -LN2, -2 * LN2)

    def test_i13_k1_is_the_log_ratio(self) -> None:
        close(kl_estimate(self.logprobs, self.reference, "k1"), row(LN2, -LN2, 0.0))

    def test_i13_k2_is_half_its_square(self) -> None:
        # ln(2)^2 / 2 = 0.2402265
        close(kl_estimate(self.logprobs, self.reference, "k2"), row(0.2402265, 0.2402265, 0.0))

    def test_i13_k3(self) -> None:
        # r = 1/2: 1/2 - 1 + ln 2 = 0.1931472;  r = 2: 2 - 1 - ln 2 = 0.3068528;  r = 1: 0
        close(kl_estimate(self.logprobs, self.reference, "k3"), row(0.1931472, 0.3068528, 0.0))

    def test_equal_models_give_exactly_zero(self) -> None:
        for kind in ("k1", "k2", "k3"):
            assert torch.count_nonzero(kl_estimate(self.logprobs, self.logprobs, kind)) == 0

    @given(st.lists(st.tuples(st.floats(-50, 0), st.floats(-50, 0)), min_size=1, max_size=8))
    def test_i13_k2_and_k3_are_never_negative(self, pairs: list[tuple[float, float]]) -> None:
        mine, theirs = torch.tensor(pairs, dtype=torch.float32).T
        assert bool((kl_estimate(mine, theirs, "k2") >= 0).all())
        assert bool((kl_estimate(mine, theirs, "k3") >= 0).all())

    def test_all_three_estimate_the_same_divergence(self) -> None:
        # Two near distributions over four tokens; expectations are exact sums, not samples.
        p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
        q = torch.tensor([0.38, 0.31, 0.2, 0.11], dtype=torch.float64)
        truth = float((p * (p.log() - q.log())).sum())
        means = {kind: float((p * kl_estimate(p.log(), q.log(), kind)).sum()) for kind in ("k1", "k2", "k3")}
        assert means["k1"] == pytest.approx(truth, rel=1e-12)
        assert means["k3"] == pytest.approx(truth, rel=1e-12)
        assert means["k2"] == pytest.approx(truth, rel=0.05)  # k2 is biased, but little here


class TestTokenRewards:
    def test_score_sits_on_the_last_counted_token(self) -> None:
        # -0.1 * kl, and the score 2 on token 2
        found = token_rewards(torch.tensor([2.0]), row(1.0, -2.0, 3.0), ALL, 0.1)
        close(found, row(-0.1, 0.2, 1.7))

    def test_ragged_rows(self) -> None:
        mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
        found = token_rewards(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, 3), mask, 0.5)
        close(found, torch.tensor([[-0.5, -0.5, 0.5], [-0.5, 1.5, 0.0], [2.5, 0.0, 0.0]]))

    def test_last_token_after_a_hole(self) -> None:
        mask = torch.tensor([[True, False, True, False]])
        found = token_rewards(torch.tensor([1.0]), torch.ones(1, 4), mask, 1.0)
        close(found, row(-1.0, 0.0, 0.0, 0.0))

    def test_rewards_add_up_to_score_minus_penalty(self) -> None:
        _, kl, mask = random_case(3)
        scores = torch.arange(5, dtype=torch.float64)
        total = masked_sum(token_rewards(scores, kl, mask, 0.3), mask, dim=1)
        close(total, scores - 0.3 * masked_sum(kl, mask, dim=1))


def naive_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, token by token: O(T^2), float64, plain Python."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for b in range(len(rewards)):
        places = [t for t in range(rewards.shape[1]) if mask[b, t]]
        r = [float(rewards[b, t]) for t in places]
        v = [float(values[b, t]) for t in places] + [0.0]
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(places))]
        for i, t in enumerate(places):
            advantage = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(places)))
            advantages[b, t], returns[b, t] = advantage, advantage + v[i]
    return advantages, returns


class TestGAE:
    def test_by_hand(self) -> None:
        # gamma = 1/2, lam = 1/2; r = (1, 0, 2), V = (1, 2, 4)
        # delta = (1 + 1 - 1, 0 + 2 - 2, 2 + 0 - 4) = (1, 0, -2)
        # A_3 = -2; A_2 = 0 + (-2)/4 = -0.5; A_1 = 1 + (-0.5)/4 = 0.875; return = A + V
        advantages, returns = generalized_advantage_estimation(row(1, 0, 2), row(1, 2, 4), ALL, 0.5, 0.5)
        close(advantages, row(0.875, -0.5, -2.0))
        close(returns, row(1.875, 1.5, 2.0))

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.99, 1.0)])
    def test_i12_against_the_double_sum(self, seed: int, gamma: float, lam: float) -> None:
        rewards, values, mask = random_case(seed)
        expected = naive_gae(rewards, values, mask, gamma, lam)
        for mine, naive in zip(
            generalized_advantage_estimation(rewards, values, mask, gamma, lam), expected, strict=True
        ):
            torch.testing.assert_close(mine, naive, rtol=0, atol=1e-12)

    def test_i12_float32_at_128_tokens(self) -> None:
        rewards, values, mask = random_case(0, rows=4, width=128)
        expected, _ = naive_gae(rewards, values, mask, 1.0, 0.95)
        found, _ = generalized_advantage_estimation(rewards.float(), values.float(), mask, 1.0, 0.95)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)  # 1e-5 of the scale, which is about 15

    def test_i12_lambda_one_is_monte_carlo(self) -> None:
        rewards, values, mask = random_case(1)
        mask = mask.long().cummin(dim=1).values.bool()  # no holes, so that reward-to-go is a plain reversed sum
        rewards = rewards * mask
        togo = rewards.flip(1).cumsum(1).flip(1)
        advantages, returns = generalized_advantage_estimation(rewards, values, mask, 1.0, 1.0)
        close(advantages, (togo - values) * mask)
        close(returns, togo * mask)

    def test_i12_lambda_zero_is_the_one_step_error(self) -> None:
        advantages, _ = generalized_advantage_estimation(row(1, 2, 3), row(10, 20, 40), ALL, 0.5, 0.0)
        close(advantages, row(1 + 10 - 10, 2 + 20 - 20, 3 + 0 - 40))

    def test_single_token(self) -> None:
        advantages, returns = generalized_advantage_estimation(row(3), row(5), ALL[:, :1], 0.7, 0.7)
        close(advantages, row(-2))
        close(returns, row(3))

    def test_i12_a_hole_is_skipped_over(self) -> None:
        # Token 1 doesn't count: the result is that of the two tokens alone.
        mask = torch.tensor([[True, False, True]])
        advantages, returns = generalized_advantage_estimation(row(1, 99, 2), row(3, 99, 4), mask, 0.9, 0.5)
        alone, alone_returns = generalized_advantage_estimation(row(1, 2), row(3, 4), ALL[:, :2], 0.9, 0.5)
        close(advantages[:, [0, 2]], alone)
        close(returns[:, [0, 2]], alone_returns)
        assert advantages[0, 1] == 0
        assert returns[0, 1] == 0


class TestWhitening:
    def test_by_hand(self) -> None:
        # mean 2, variance with Bessel's correction (1 + 0 + 1) / 2 = 1
        close(masked_whiten(row(1, 2, 3), ALL), row(-1, 0, 1))

    def test_only_counted_tokens_enter(self) -> None:
        mask = torch.tensor([[True, True, False]])
        # mean 2, variance (1 + 1) / 1 = 2
        close(masked_whiten(row(1, 3, 1000), mask), row(-1 / math.sqrt(2), 1 / math.sqrt(2), 0))

    def test_i13_mean_and_variance_of_whitening(self) -> None:
        values, _, mask = random_case(4)
        white = masked_whiten(values, mask)
        assert float(masked_mean(white, mask)) == pytest.approx(0, abs=1e-6)
        assert float(masked_var(white, mask)) == pytest.approx(1, abs=1e-6)

    @pytest.mark.parametrize("values", [row(7, 7, 7), row(7)])
    def test_nothing_to_scale_gives_zero(self, values: Tensor) -> None:
        assert torch.count_nonzero(masked_whiten(values, ALL[:, : values.shape[1]])) == 0

    def test_mean_of_nothing_is_zero(self) -> None:
        assert float(masked_mean(row(1, 2, 3), ~ALL)) == 0
        close(masked_mean(row(1, 2, 3), ~ALL, dim=1), torch.zeros(1))


class TestCriticFree:
    def test_rloo_by_hand(self) -> None:
        # group (1, 2, 6): 1 - 4, 2 - 3.5, 6 - 1.5; group (0, 0, 3): -1.5, -1.5, 3
        found = rloo_advantages(torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0]), 3)
        close(found, torch.tensor([-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]))

    def test_rloo_against_a_loop(self) -> None:
        scores = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for group in (2, 3, 4, 6):
            loop = [
                float(scores[i])
                - sum(float(scores[j]) for j in range(i // group * group, i // group * group + group) if j != i)
                / (group - 1)
                for i in range(12)
            ]
            close(rloo_advantages(scores, group), torch.tensor(loop, dtype=torch.float64))

    def test_grpo_by_hand(self) -> None:
        # mean 2, std with Bessel's correction sqrt((1 + 0 + 1) / 2) = 1, eps 1e-4: 1 / 1.0001
        found = group_advantages(torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 10.0]), 3)
        close(found, torch.tensor([-0.99990001, 0.0, 0.99990001, 0.0, 0.0, 0.0]))

    def test_both_add_up_to_zero_in_each_group(self) -> None:
        scores = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for estimate in (rloo_advantages, group_advantages):
            close(estimate(scores, 4).view(2, 4).sum(1), torch.zeros(2))


class TestPolicyLoss:
    old = torch.zeros(1, 3, dtype=torch.float64)

    def loss(self, ratios: Tensor, advantages: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return policy_loss(ratios.log(), self.old, advantages, ALL, **options)

    def test_i13_gains_are_clipped_above(self) -> None:
        # A = 1: -min(rho, 1.2): 0.5 -> -0.5 (not clipped), 1.1 -> -1.1, 1.5 -> -1.2 (clipped)
        losses, clipped = self.loss(row(0.5, 1.1, 1.5), row(1, 1, 1))
        close(losses, row(-0.5, -1.1, -1.2))
        assert clipped.tolist() == [[False, False, True]]

    def test_i13_losses_are_clipped_below(self) -> None:
        # A = -1: -min(-rho, -clip(rho)): 0.5 -> 0.8 (clipped), 0.9 -> 0.9, 1.5 -> 1.5 (not clipped)
        losses, clipped = self.loss(row(0.5, 0.9, 1.5), row(-1, -1, -1))
        close(losses, row(0.8, 0.9, 1.5))
        assert clipped.tolist() == [[True, False, False]]

    def test_asymmetric_range(self) -> None:
        # [1 - 0.1, 1 + 0.4]: A = 2, rho 1.5 -> -2.8; A = -2, rho 0.8 -> 1.8; A = 2, rho 1.3 -> -2.6
        losses, clipped = self.loss(row(1.5, 0.8, 1.3), row(2, -2, 2), clip_low=0.1, clip_high=0.4)
        close(losses, row(-2.8, 1.8, -2.6))
        assert clipped.tolist() == [[True, True, False]]

    def test_dual_clip_bounds_the_loss_of_bad_tokens(self) -> None:
        # c = 3, A = -1: rho 5 -> 3 (bounded), rho 2 -> 2; A = 1 is never bounded: rho 5 -> -1.2
        losses, clipped = self.loss(row(5, 2, 5), row(-1, -1, 1), dual_clip=3.0)
        close(losses, row(3, 2, -1.2))
        assert clipped.tolist() == [[True, False, True]]

    def test_ratio_one_is_minus_the_advantage(self) -> None:
        losses, clipped = self.loss(row(1, 1, 1), row(3, -4, 0))
        close(losses, row(-3, 4, 0))
        assert not clipped.any()

    def test_a_clipped_gain_has_no_gradient(self) -> None:
        logprobs = row(1.5, 1.0, 0.5).log().requires_grad_()
        losses, _ = policy_loss(logprobs, self.old, row(1, 1, 1), ALL)
        (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
        close(gradient, row(0.0, -1.0, -0.5))  # d(-rho A)/d logprob = -rho A


class TestValueLoss:
    def test_by_hand(self) -> None:
        # V - R = (2, 0.5, -1), halves of squares
        losses, clipped = value_loss(row(3, 1, 1), row(0, 0, 0), row(1, 0.5, 2), ALL, clip=None)
        close(losses, row(2, 0.125, 0.5))
        assert not clipped.any()

    def test_i13_value_clip_takes_the_worse_of_the_two(self) -> None:
        # clip 0.2 around Vold. Token 0: V 1, Vold 0, R 1: clipped V 0.2, error 0.64 > 0: loss 0.32.
        # Token 1: V 1, Vold 0, R -1: unclipped error 4 > 1.44: loss 2. Token 2: V 0.1 inside: error 0.81 / 2.
        losses, clipped = value_loss(row(1, 1, 0.1), row(0, 0, 0), row(1, -1, 1), ALL, clip=0.2)
        close(losses, row(0.32, 2.0, 0.405))
        assert clipped.tolist() == [[True, False, False]]

    def test_clip_also_holds_below(self) -> None:
        # V -1, Vold 0, R -1: clipped V is -0.2, error 0.64
        losses, _ = value_loss(row(-1), row(0), row(-1), ALL[:, :1], clip=0.2)
        close(losses, row(0.32))


class TestAggregate:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    values = torch.tensor([[1.0, 2.0, 3.0], [10.0, 77.0, 77.0]])

    def test_token_mean(self) -> None:
        assert float(aggregate(self.values, self.mask, "token")) == pytest.approx(16 / 4)

    def test_sequence_mean(self) -> None:
        assert float(aggregate(self.values, self.mask, "sequence")) == pytest.approx((2 + 10) / 2)

    @pytest.mark.parametrize(("how", "total"), [("token", 4.0), ("sequence", 2.0)])
    def test_microbatches_add_up_to_the_minibatch(self, how: Any, total: float) -> None:
        parts = [aggregate(self.values[i : i + 1], self.mask[i : i + 1], how, total) for i in range(2)]
        assert float(sum(parts)) == pytest.approx(float(aggregate(self.values, self.mask, how)))

    def test_the_naive_mean_of_microbatches_differs(self) -> None:
        naive = sum(float(aggregate(self.values[i : i + 1], self.mask[i : i + 1], "token")) for i in range(2)) / 2
        assert naive != pytest.approx(float(aggregate(self.values, self.mask, "token")))


class TestExplainedVariance:
    def test_by_hand(self) -> None:
        # returns (0, 2, 4): variance 4; rest (0, 1, 0): mean 1/3, variance (1/9 + 4/9 + 1/9) / 2 = 1/3
        assert float(explained_variance(row(0, 1, 4), row(0, 2, 4), ALL)) == pytest.approx(1 - 1 / 12)

    def test_perfect_and_useless(self) -> None:
        returns = row(1, 2, 4)
        assert float(explained_variance(returns, returns, ALL)) == 1.0
        assert float(explained_variance(row(0, 0, 0), returns, ALL)) == pytest.approx(0.0)

    def test_returns_that_do_not_vary(self) -> None:
        assert float(explained_variance(row(1, 2, 3), row(5, 5, 5), ALL)) == 0.0


class TestAdaptiveCoefficient:
    def test_by_hand(self) -> None:
        # KL 6.6 of target 6: error 0.1; 50 responses of a horizon of 1000: factor 1 + 0.1 * 0.05
        assert adapt_kl_coef(0.2, 6.6, 6.0, 1000, 50) == pytest.approx(0.2 * 1.005)

    def test_error_is_clipped_on_both_sides(self) -> None:
        assert adapt_kl_coef(1.0, 600.0, 6.0, 100, 10) == pytest.approx(1.02)
        assert adapt_kl_coef(1.0, 0.0, 6.0, 100, 10) == pytest.approx(0.98)

    def test_on_target_nothing_changes(self) -> None:
        assert adapt_kl_coef(0.3, 6.0, 6.0, 100, 10) == 0.3


class TestFiniteDifferences:
    """Gradients against central differences in float64 (torch.autograd.gradcheck)."""

    random = torch.Generator().manual_seed(0)
    logprobs = torch.randn(3, 4, generator=random, dtype=torch.float64) * 0.3
    old = torch.randn(3, 4, generator=random, dtype=torch.float64) * 0.3
    other = torch.randn(3, 4, generator=random, dtype=torch.float64)
    mask = torch.rand(3, 4, generator=random) < 0.7

    def check(self, loss: Callable[[Tensor], Tensor], at: Tensor) -> None:
        assert torch.autograd.gradcheck(loss, (at.clone().requires_grad_(),), atol=1e-6, rtol=1e-6)

    @pytest.mark.parametrize("how", ["token", "sequence"])
    @pytest.mark.parametrize("dual_clip", [None, 1.5])
    def test_i14_policy_loss(self, how: Any, dual_clip: float | None) -> None:
        def loss(logprobs: Tensor) -> Tensor:
            return aggregate(
                policy_loss(logprobs, self.old, self.other, self.mask, 0.2, 0.3, dual_clip)[0], self.mask, how
            )

        self.check(loss, self.logprobs)

    @pytest.mark.parametrize("clip", [None, 0.2])
    def test_i14_value_loss(self, clip: float | None) -> None:
        self.check(
            lambda values: aggregate(value_loss(values, self.old, self.other, self.mask, clip)[0], self.mask),
            self.logprobs,
        )

    @pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
    def test_i14_kl(self, kind: Any) -> None:
        self.check(lambda logprobs: aggregate(kl_estimate(logprobs, self.other, kind), self.mask), self.logprobs)


GARBAGE = st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -3.0, 0.0])


def objectives(tensors: list[Tensor], mask: Tensor) -> list[Tensor]:
    """Everything that takes a mask, and the gradients of the losses."""
    a, b, c = tensors
    mine = a.clone().requires_grad_()
    losses, clipped = policy_loss(mine, b, c, mask, dual_clip=2.0)
    (policy_gradient,) = torch.autograd.grad(aggregate(losses, mask), mine)
    errors, value_clipped = value_loss(mine, b, c, mask)
    (value_gradient,) = torch.autograd.grad(aggregate(errors, mask, "sequence"), mine)
    advantages, returns = generalized_advantage_estimation(a, b, mask, 0.9, 0.8)
    return [
        losses.detach(), clipped, policy_gradient, errors.detach(), value_clipped, value_gradient, advantages, returns,
        token_rewards(torch.ones(len(a)), a, mask, 0.1), masked_whiten(a, mask),
        masked_sum(a, mask), masked_mean(a, mask, dim=1), masked_var(a, mask), explained_variance(a, b, mask),
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(GARBAGE, GARBAGE, GARBAGE), min_size=4, max_size=4), st.integers(0, 1000))
def test_i05_garbage_under_the_mask_changes_nothing_bitwise(
    garbage: list[tuple[float, float, float]], seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[True, False, True, False], [True, True, False, False]])
    clean = [torch.randn(2, 4, generator=random) for _ in range(3)]
    dirty = [tensor.clone() for tensor in clean]
    for tensor, values in zip(dirty, zip(*garbage, strict=True), strict=True):
        tensor[~mask] = torch.tensor(values)
    for number, (found, expected) in enumerate(zip(objectives(dirty, mask), objectives(clean, mask), strict=True)):
        assert torch.equal(found, expected), f"objective {number} looks under the mask"
