"""The base's own tensors in a model that may have adapters on it, under the names they have without them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

WRAPPED_MODULE_NAMES = ("base_layer", "original_module")
"""What PEFT's layers call the module that they wrap."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is: the attribute of a module, and whether files hold it (buffers may be computed)."""

    module: nn.Module
    attribute: str
    kept: bool

    @property
    def tensor(self) -> Tensor:
        """What is there now."""
        tensor: Tensor = getattr(self.module, self.attribute)
        return tensor


def base_places(model: nn.Module) -> dict[str, Place]:
    """Parameters and buffers of the base by name; tied ones under each of their names. PEFT's own are left out."""
    places: dict[str, Place] = {}
    adapters: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if any(path.startswith(prefix) for prefix in adapters):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            adapters += [f"{path}.{name}" for name in module.adapter_layer_names]
        before = f"{path}." if path else ""
        for name, kept in _own(module):
            if not any(f"{before}{name}".startswith(prefix) for prefix in adapters):
                plain = ".".join(part for part in before.split(".") if part not in WRAPPED_MODULE_NAMES)
                places[f"{plain}{name}"] = Place(module, name, kept)
    return places


def _own(module: nn.Module) -> Iterator[tuple[str, bool]]:
    yield from ((name, True) for name, parameter in module._parameters.items() if parameter is not None)
    temporary = module._non_persistent_buffers_set
    yield from ((name, name not in temporary) for name, buffer in module._buffers.items() if buffer is not None)
