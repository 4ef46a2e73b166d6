"""RewardBank: what loading, checking and applying a reward adapter needs of the bank that holds it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from marl_core.bank.identity.fingerprint import Fingerprint
from marl_core.bank.identity.which_base import Origin
from marl_core.bank.trunk import Trunk
from marl_core.bank.views import ScoreView, View
from marl_core.registry.strategy import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RewardBank(Protocol):
    """A base with named adapters and heads on it. AdapterBank is one."""

    tokenizer: PreTrainedTokenizerBase
    trunk: Trunk
    quantization: Quantization
    fingerprint: Fingerprint | None
    origin: Origin | None
    heads: dict[str, nn.Linear]
    reward_views: dict[str, ScoreView]
    reward_checks: dict[str, str]

    @property
    def base(self) -> PreTrainedModel:
        """The causal language model."""

    @property
    def device(self) -> torch.device:
        """Where the base lives."""

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters."""

    @property
    def as_read(self) -> bool:
        """Whether origin and fingerprint still hold."""

    def frozen(
        self,
        path: str | Path,
        role: str,
        asked_by: str = "adapter",
        *,
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Name of the frozen adapter at `path`, loaded when it isn't there yet."""

    def remove(self, name: str) -> None:
        """Take an adapter or a head out."""

    def view(self, view: View) -> AbstractContextManager[Any]:
        """Open a View."""

    def score(self, view: ScoreView | str, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores of whole sequences: ids, mask [B, L] -> [B] float32."""
