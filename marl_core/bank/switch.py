"""The cheap adapter switch.

PEFT's public calls walk the whole model, take tens of milliseconds and change which weights are trainable. A loop
over the LoRA layers that sets two fields takes one, changes nothing else, and gives bitwise the same outputs. The
fields are private to PEFT, so they are named here and nowhere else; a test compares with the public calls.
"""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class AdapterSwitch:
    """All LoRA layers of one model, set to one adapter or to none."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    def set(self, adapter: str | None) -> None:
        """Make `adapter` the only active one; None switches all off."""
        for layer in self._layers:
            layer._disable_adapters = adapter is None
            layer._active_adapter = [] if adapter is None else [adapter]

    def seen(self) -> tuple[tuple[bool, str], ...]:
        """What the layers are set to, each different setting once: off or not, and the active adapters."""
        return tuple(sorted({(layer._disable_adapters, str(layer._active_adapter)) for layer in self._layers}))

    def scalings(self, adapter: str) -> tuple[float, ...]:
        """By how much each layer multiplies what this adapter adds."""
        scales = (getattr(layer, "scaling", {}) for layer in self._layers)
        return tuple(float(scale[adapter]) for scale in scales if adapter in scale)

    def set_dropout(self, adapter: str | None, on: bool) -> bool:
        """Switch the LoRA dropout of one adapter; whether it was on."""
        dropouts = [getattr(layer, "lora_dropout", {}) for layer in self._layers]
        mine = [dropout[adapter] for dropout in dropouts if adapter is not None and adapter in dropout]
        was_on = any(module.training for module in mine)
        for module in mine:
            module.train(on)
        return was_on
