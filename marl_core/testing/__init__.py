"""For plugin authors and for our own tests: a tiny model, fake rollouts, and the contract every strategy must keep."""

from marl_core.testing.contract import check_strategy
from marl_core.testing.tiny import add_policy, fake_rollout, tiny_bank, tiny_model, tiny_tokenizer, write_tiny_model

__all__ = [
    "add_policy",
    "check_strategy",
    "fake_rollout",
    "tiny_bank",
    "tiny_model",
    "tiny_tokenizer",
    "write_tiny_model",
]
