"""How exact a float32 gradient is: against float64, packed rows are no further off than padded ones (I11, I23)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from marl_core import AdapterBank, Prompts, Rollout
from marl_core.ppo.scoring import forward
from marl_core.testing import tiny_bank

ROWS = [[40, 41, 42, 43, 44], [50], [60, 61, 2], [70, 71]]
WAYS = [(pack, size) for pack in (False, True) for size in (4, 2, 1)]


def gradient(
    bank: AdapterBank, rollout: Rollout, weights: Tensor, pack: bool, size: int, exact: bool = False
) -> Tensor:
    """Of the weighted sum of log-probs, `size` rows at a time; `exact`: by transformers alone, in the base's dtype."""
    bank.trunk.options = replace(bank.trunk.options, pack=pack)
    for parameter in bank.parameters("policy").values():
        parameter.grad = None
    for first in range(0, len(rollout), size):
        piece, mine = rollout.select(slice(first, first + size)), weights[first : first + size]
        with bank.using("policy", train=True):
            if exact:
                logits = bank.trunk.logits(piece.sequence_ids, piece.sequence_mask, piece.ids.shape[1] + 1)[:, :-1]
                found = logits.log_softmax(-1).gather(-1, piece.ids[..., None]).squeeze(-1)
            else:
                found = forward(bank, piece, 1.0).logprobs
            (found * mine.to(found.dtype))[piece.mask].sum().backward()
    parameters = bank.parameters("policy").values()
    return torch.cat([parameter.grad.double().flatten() for parameter in parameters if parameter.grad is not None])


@pytest.mark.parametrize("width", [32, 64])
def test_packed_rows_round_elsewhere_and_not_more(width: int) -> None:
    """Measured over eight models: padded 0.8e-6 to 2.9e-6 from float64, packed 0.7e-6 to 3.4e-6; to each other up to 4.7e-6."""
    bank = tiny_bank(policy="policy", hidden_size=width, intermediate_size=2 * width)
    random = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in bank.parameters("policy").values():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.05)
    prompts = Prompts.of([bank.tokenizer(text).input_ids for text in ("A good", "Bad", "I", "What a film")], 0)
    rollout = Rollout.from_responses(prompts, ROWS, bank.tokenizer)
    weights = torch.randn(rollout.ids.shape, generator=random)
    found = {way: gradient(bank, rollout, weights, *way) for way in WAYS}
    for module in bank.all_modules():
        module.double()
    exact = gradient(bank, rollout, weights, False, 4, exact=True)
    off = {way: float((one - exact).norm() / exact.norm()) for way, one in found.items()}
    assert max(off.values()) < 1e-5
    assert max(off[True, size] for size in (4, 2, 1)) < 2 * max(off[False, size] for size in (4, 2, 1))
    padded = [float((found[False, size] - found[False, 4]).norm() / exact.norm()) for size in (2, 1)]
    assert max(padded) < 1e-6  # the same products in the same order: closer to each other than to the truth
