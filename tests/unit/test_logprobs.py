"""Chunked log-probs with a gradient of their own, against plain log_softmax in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from marl_core.ppo import logprobs as module
from marl_core.ppo.logprobs import chosen_logprobs, logits_logprobs

TOKENS, WIDTH, VOCABULARY = 13, 6, 11


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=random).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=random).to(dtype)
    bias = torch.randn(VOCABULARY, generator=random).to(dtype)
    return hidden, weight, bias, torch.randint(0, VOCABULARY, (TOKENS,), generator=random)


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The textbook: all logits at once."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "words"), [(1, 1), (4, 7), (TOKENS, VOCABULARY), (1000, 1000)])
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, rows: int, words: int, with_bias: bool, temperature: float
) -> None:
    monkeypatch.setattr(module, "TILE_TOKENS", rows)
    monkeypatch.setattr(module, "TILE_VOCABULARY", words)
    hidden, weight, bias, targets = inputs()
    mine = hidden.clone().requires_grad_()
    truth = hidden.double().requires_grad_()
    used = bias if with_bias else None
    found = chosen_logprobs(mine, weight, used, targets, temperature, entropy=True)
    expected = plain(truth, weight.double(), None if used is None else used.double(), targets, temperature)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    pull = torch.randn(
        2, TOKENS, generator=torch.Generator().manual_seed(1)
    )  # any upstream gradient, both outputs at once
    (gradient,) = torch.autograd.grad((found[0] * pull[0]).sum() + (found[1] * pull[1]).sum(), mine)
    (wanted,) = torch.autograd.grad((expected[0] * pull[0]).sum() + (expected[1] * pull[1]).sum(), truth)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=2e-5)


def test_by_hand() -> None:
    # Two tokens of a vocabulary with logits (ln 3, 0): probabilities 3/4 and 1/4.
    # Entropy: 3/4 ln(4/3) + 1/4 ln 4 = 0.5623351
    hidden, weight = torch.ones(2, 1), torch.tensor([[3.0], [1.0]]).log()
    logp, entropy = chosen_logprobs(hidden, weight, None, torch.tensor([0, 1]), entropy=True)
    torch.testing.assert_close(logp.exp(), torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(entropy, torch.full((2,), 0.5623351))


def test_entropy_is_zeros_unless_asked_for() -> None:
    hidden, weight, _, targets = inputs()
    logp, entropy = chosen_logprobs(hidden, weight, None, targets)
    assert torch.equal(entropy, torch.zeros(TOKENS))
    assert torch.equal(logp, chosen_logprobs(hidden, weight, None, targets, entropy=True)[0])


def test_gradient_does_not_change_the_values() -> None:
    # PPO's ratio is 1 only if the pass with a graph gives what the pass without gave.
    hidden, weight, bias, targets = inputs()
    with_graph, _ = chosen_logprobs(hidden.clone().requires_grad_(), weight, bias, targets)
    with torch.no_grad():
        without, _ = chosen_logprobs(hidden, weight, bias, targets)
    assert torch.equal(with_graph.detach(), without)


def test_bfloat16_base() -> None:
    hidden, weight, bias, targets = inputs(torch.bfloat16)
    mine = hidden.clone().requires_grad_()
    found, entropy = chosen_logprobs(mine, weight, bias, targets, 1.0, entropy=True)
    assert found.dtype == entropy.dtype == torch.float32
    truth = hidden.double().requires_grad_()
    expected, expected_entropy = plain(truth, weight.double(), bias.double(), targets, 1.0)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.05)  # bfloat16 logits of up to 8 are 1/32 apart
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=0.05)
    (gradient,) = torch.autograd.grad(found.sum() + entropy.sum(), mine)
    (wanted,) = torch.autograd.grad(expected.sum() + expected_entropy.sum(), truth)
    assert gradient.dtype == torch.bfloat16
    assert float(torch.nn.functional.cosine_similarity(gradient.double().flatten(), wanted.flatten(), dim=0)) > 0.999


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ready_logits_give_the_same(temperature: float) -> None:
    hidden, weight, bias, targets = inputs()
    logits = hidden @ weight.T + bias
    found = logits_logprobs(logits, targets, temperature, entropy=True)
    for one, other in zip(
        found, chosen_logprobs(hidden, weight, bias, targets, temperature, entropy=True), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert torch.count_nonzero(logits_logprobs(logits, targets)[1]) == 0


def test_huge_logits_stay_finite() -> None:
    hidden, weight = torch.full((2, 1), 1e4), torch.tensor([[1.0], [-1.0]])
    logp, entropy = chosen_logprobs(hidden.requires_grad_(), weight, None, torch.tensor([0, 1]), entropy=True)
    assert logp.tolist() == [0.0, -2e4]
    assert entropy.tolist() == [0.0, 0.0]


def test_banned_tokens_have_no_probability() -> None:
    """Against a log-softmax whose banned columns are -inf, gradients included."""
    noise = torch.Generator().manual_seed(3)
    hidden = torch.randn(5, 8, generator=noise, dtype=torch.float32)
    weight = torch.randn(11, 8, generator=noise)
    targets = torch.tensor([3, 4, 5, 6, 7])
    places, tokens = torch.tensor([True, False, True, False, True]), torch.tensor([0, 2])
    mine = hidden.clone().requires_grad_()
    found, _ = chosen_logprobs(mine, weight, None, targets, 0.7, False, (places, tokens))
    plain = hidden.clone().requires_grad_()
    logits = plain @ weight.T / 0.7
    ban = torch.zeros_like(logits)
    ban[places.nonzero(), tokens] = -torch.inf
    expected = (logits + ban).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1), atol=1e-3)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(mine.grad, plain.grad, atol=1e-5, rtol=1e-4)


def test_min_new_tokens_is_scored_as_it_was_sampled() -> None:
    """Sampled frequencies of the first token equal the scored probabilities, with the stop token left out."""
    from marl_core.config.run_config import SamplingSection
    from marl_core.ppo.sampling.sampler import PolicySampler
    from marl_core.ppo.scoring import forward
    from marl_core.ppo.types import Prompts
    from marl_core.testing import tiny_bank

    bank = tiny_bank()
    count = 2000
    prompts = Prompts.of([[5, 6]] * count, 0)
    rollout = PolicySampler(bank, None, SamplingSection(max_new_tokens=1, min_new_tokens=1), (2,))(prompts, 0)
    with torch.no_grad():
        scored = forward(bank, rollout, 1.0).logprobs[:, 0].exp()
    token = int(rollout.ids[:, 0].mode().values)
    share = float((rollout.ids[:, 0] == token).float().mean())
    probability = float(scored[rollout.ids[:, 0] == token][0])
    assert abs(share - probability) < 4 * (probability * (1 - probability) / count) ** 0.5
    assert not bool((rollout.ids == 2).any())
