"""Log-probs under another model: what a reference whose weights live elsewhere needs."""

from __future__ import annotations

from torch import Tensor

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.views import View
from marl_core.ppo.scoring import view_logprobs
from marl_core.ppo.types import Rollout


def response_logprobs(
    bank: AdapterBank, rollout: Rollout, temperature: float = 1.0, batch: int = 8, adapter: str | None = None
) -> Tensor:
    """Log-probs [B, T] float32 of a rollout's responses under a bank's base, seen bare or through `adapter`.

    The distribution is the one the core scores with: padding, temperature and `sampling.min_new_tokens` included; masked
    places are 0. Without gradient, `batch` responses at a time; the result is on the rollout's device.
    """
    found = view_logprobs(bank, View(adapter), rollout.to(bank.device), temperature, batch).logprobs
    return found.to(rollout.ids.device)
