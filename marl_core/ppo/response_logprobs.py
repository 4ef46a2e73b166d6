"""Log-probs under another model: what a reference whose weights live elsewhere needs."""

from __future__ import annotations

import math

from torch import Tensor

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.views import View
from marl_core.errors import ConfigError
from marl_core.ppo.budget import PassLimits
from marl_core.ppo.scoring import require_fit, view_output
from marl_core.ppo.types import Rollout


def response_logprobs(
    bank: AdapterBank, rollout: Rollout, temperature: float = 1.0, batch: int = 8, adapter: str | None = None
) -> Tensor:
    """Log-probs [B, T] float32 of a rollout's responses under a bank's base, seen bare or through `adapter`.

    The distribution is the one the core scores with: padding, temperature and `sampling.min_new_tokens` included; masked
    positions are 0. Without gradient, `batch` responses at a time; the result is on the rollout's device.

    ConfigError for a temperature or batch that isn't above 0, DataError for tokens or lengths that the base doesn't have.
    """
    if not isinstance(temperature, int | float | Tensor) or not 0 < float(temperature) < math.inf:
        raise ConfigError(f"response_logprobs: temperature: expected a number above 0, got {temperature!r}.")
    if not isinstance(batch, int) or batch < 1:
        raise ConfigError(f"response_logprobs: batch: expected a whole number above 0, got {batch!r}.")
    rollout_here = rollout.to(bank.device)
    require_fit(bank, rollout_here)
    output = view_output(bank, View(adapter), rollout_here, float(temperature), PassLimits(batch))
    return output.logprobs.to(rollout.ids.device)
