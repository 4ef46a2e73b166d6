"""The base is the base: its bits are looked at before and after an adapter is made or loaded.

Some of PEFT's options rewrite the weights under an adapter (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, KaSA, and whatever
comes next), which every role on this base would see. They assign to `.data`, past torch's version counters, so only
the bytes tell. What was there before is kept alive meanwhile, which costs nothing unless somebody replaces it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftConfig
from torch import Tensor, nn

from marl_core.bank.base_tensors import base_places
from marl_core.bank.identity.digest import digest

Mark = tuple[int, int, tuple[int, ...]]
_OPTIONS_OF_ANY = (
    "r",
    "lora_alpha",
    "target_modules",
    "lora_dropout",
    "task_type",
    "peft_type",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
    "fan_in_fan_out",
)


@dataclass(frozen=True, slots=True)
class Look:
    """The base at one moment: each tensor itself, what it held (not copied), and its digest."""

    tensors: dict[str, Tensor]
    data: dict[str, Tensor]
    digests: dict[str, int]


class BaseGuard:
    """Looks at the base of a bank. A look reads every byte, unless nothing was written since the last one."""

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._marks: dict[str, Mark] = {}
        self._digests: dict[str, int] = {}

    def look(self) -> Look:
        """The base now, to be compared with later."""
        tensors = self._tensors()
        if self.marks() != self._marks:
            self._note(tensors)
        return Look(tensors, {name: tensor.data for name, tensor in tensors.items()}, dict(self._digests))

    def marks(self) -> dict[str, Mark]:
        """What changes when a tensor is replaced or written to by torch's rules; no byte is read."""
        return {name: _mark(tensor) for name, tensor in self._tensors().items()}

    def changed(self, before: Look) -> list[str]:
        """Names of the tensors whose bytes are others than before; every byte is read."""
        tensors = self._tensors()
        self._note(tensors)
        return [
            name for name in {**before.digests, **self._digests} if before.digests.get(name) != self._digests.get(name)
        ]

    def put_back(self, before: Look) -> bool:
        """Give changed tensors back what they held before; whether the base is as it was. Take the adapter out first."""
        changed = set(self.changed(before))
        for name, place in base_places(self._base).items():
            if name in changed and name in before.tensors:
                tensor = before.tensors[name]
                where = place.module._parameters if isinstance(tensor, nn.Parameter) else place.module._buffers
                tensor.data = before.data[name]
                where[place.attribute] = tensor  # type: ignore[assignment]  # a parameter among parameters
        return not (changed and self.changed(before))

    @torch.no_grad()
    def put_back_from(self, source: nn.Module, before: Look) -> bool:
        """Copy changed tensors from a model that was read anew, where they were written in place; as `put_back`."""
        places, others = base_places(self._base), base_places(source)
        for name in self.changed(before):
            if name in places and name in others and places[name].tensor.shape == others[name].tensor.shape:
                places[name].tensor.data.copy_(others[name].tensor)
        return not self.changed(before)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: place.tensor for name, place in base_places(self._base).items() if not place.tensor.is_meta}

    def _note(self, tensors: dict[str, Tensor]) -> None:
        known: dict[int, Tensor] = {}
        for tensor in tensors.values():  # all are started before one is waited for; tied ones are read once
            if id(tensor) not in known:
                known[id(tensor)] = digest(tensor)
        numbers = {key: int(value) for key, value in known.items()}
        self._digests = {name: numbers[id(tensor)] for name, tensor in tensors.items()}
        self._marks = {name: _mark(tensor) for name, tensor in tensors.items()}


def _mark(tensor: Tensor) -> Mark:
    """Which tensor, how often it was written to, and where its numbers are."""
    return id(tensor), tensor._version, _pointers(tensor)


def _pointers(tensor: Tensor) -> tuple[int, ...]:
    if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return tuple(pointer for part in parts if isinstance(part, Tensor) for pointer in _pointers(part))
    return (tensor.data_ptr(),)


def unusual(config: PeftConfig) -> str:
    """The options of an adapter that aren't PEFT's defaults and may do more than add it, in words."""
    plain, mine = (vars(each) for each in (type(config)(), config))
    options = {name: value for name, value in mine.items() if name not in _OPTIONS_OF_ANY and value != plain.get(name)}
    return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "none of its options is unusual"
