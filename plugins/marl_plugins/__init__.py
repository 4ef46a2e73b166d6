"""marl's built-in strategies: guests of marl_core like any other package's. Each class is fetched when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marl_plugins.adapter.ia3 import Ia3
    from marl_plugins.adapter.lora import Dora, Lora
    from marl_plugins.adapter.miss import Miss
    from marl_plugins.adapter.oft import Oft
    from marl_plugins.adapter.peft import Peft
    from marl_plugins.adapter.tinylora import Tinylora
    from marl_plugins.advantage import GAE, GRPO, RLOO
    from marl_plugins.observers import Console, JsonLines, Trackers
    from marl_plugins.quantization import Bnb4Bit, Bnb8Bit, NoQuantization
    from marl_plugins.quantization_torchao import TorchaoInt8
    from marl_plugins.reference import DisabledAdapter, MergedBase, NoReference, PeftAdapter
    from marl_plugins.reference_model import ModelReference
    from marl_plugins.reference_moving import EmaAdapter
    from marl_plugins.reward import AdapterReward, FunctionReward, ModelReward
    from marl_plugins.reward_http import HttpReward
    from marl_plugins.reward_process import ProcessReward
    from marl_plugins.reward_text import LengthFormat

_HOMES = {
    "adapter.ia3": ("Ia3",),
    "adapter.lora": ("Dora", "Lora"),
    "adapter.miss": ("Miss",),
    "adapter.oft": ("Oft",),
    "adapter.peft": ("Peft",),
    "adapter.tinylora": ("Tinylora",),
    "advantage": ("GAE", "GRPO", "RLOO"),
    "observers": ("Console", "JsonLines", "Trackers"),
    "quantization": ("Bnb4Bit", "Bnb8Bit", "NoQuantization"),
    "quantization_torchao": ("TorchaoInt8",),
    "reference": ("DisabledAdapter", "MergedBase", "NoReference", "PeftAdapter"),
    "reference_model": ("ModelReference",),
    "reference_moving": ("EmaAdapter",),
    "reward": ("AdapterReward", "FunctionReward", "ModelReward"),
    "reward_http": ("HttpReward",),
    "reward_process": ("ProcessReward",),
    "reward_text": ("LengthFormat",),
}
_HOME = {name: f"marl_plugins.{home}" for home, names in _HOMES.items() for name in names}

__all__ = [
    "GAE",
    "GRPO",
    "RLOO",
    "AdapterReward",
    "Bnb4Bit",
    "Bnb8Bit",
    "Console",
    "DisabledAdapter",
    "Dora",
    "EmaAdapter",
    "FunctionReward",
    "HttpReward",
    "Ia3",
    "JsonLines",
    "LengthFormat",
    "Lora",
    "MergedBase",
    "Miss",
    "ModelReference",
    "ModelReward",
    "NoQuantization",
    "NoReference",
    "Oft",
    "Peft",
    "PeftAdapter",
    "ProcessReward",
    "Tinylora",
    "TorchaoInt8",
    "Trackers",
]


def __getattr__(name: str) -> Any:
    """Import a strategy's module when its class is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module 'marl_plugins' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
