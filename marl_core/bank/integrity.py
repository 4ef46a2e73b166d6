"""What somebody else's code must leave alone in a bank: weights, who learns, who is active, train mode."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.identity.digest import digest
from marl_core.bank.parts import adapter_parameters


class Weights:
    """Tensors by name and their version counters: torch counts every change in place. Looking costs microseconds.

    Changes through `.data` aren't counted; `checksum` sees those, and costs a reading of all weights.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        found = dict(named)
        self._names, self._tensors = list(found), list(found.values())
        self._versions = self.versions()

    def versions(self) -> list[int]:
        """Each tensor's counter now."""
        return [tensor._version for tensor in self._tensors]

    def changed(self, since: list[int] | None = None) -> list[str]:
        """Names of the tensors written to since `since`, or since the last `note`."""
        now, then = self.versions(), self._versions if since is None else since
        if now == then:
            return []
        return [name for name, one, other in zip(self._names, now, then, strict=True) if one != other]

    def note(self) -> None:
        """Take what is there now as right."""
        self._versions = self.versions()

    @torch.no_grad()
    def checksum(self) -> int:
        """Sum of all tensors' digests: any one change shows."""
        found = [digest(tensor) for tensor in self._tensors]  # all are started before one is waited for
        return sum(int(one) for one in found)


def frozen_weights(bank: AdapterBank) -> Weights:
    """The base, the adapters that were read from disk and don't learn, and the frozen heads.

    An adapter that a strategy added for itself isn't among them: it may follow the policy.
    """
    known = {name for name in bank.paths if name not in bank.trainable}
    return Weights([*_outside(bank, {name for name in bank.adapters if name not in known}), *_heads(bank, False)])


def learning_weights(bank: AdapterBank) -> Weights:
    """Every adapter and head that learns."""
    trained = [pair for adapter in bank.trainable for pair in adapter_parameters(bank.base, adapter).items()]
    return Weights([*trained, *_heads(bank, True)])


def _outside(bank: AdapterBank, adapters: Iterable[str]) -> Iterable[tuple[str, Tensor]]:
    theirs = {id(p) for adapter in adapters for p in adapter_parameters(bank.base, adapter).values()}
    return ((name, p) for name, p in bank.base.named_parameters() if id(p) not in theirs)


def _heads(bank: AdapterBank, learning: bool) -> Iterable[tuple[str, Tensor]]:
    return (
        (f"{name}.{key}", p)
        for name, head in bank.heads.items()
        for key, p in head.named_parameters()
        if p.requires_grad == learning
    )


class Flags:
    """Which parameters learn, which modules are in train mode, which adapter is active: read once, put back on demand."""

    def __init__(self, bank: AdapterBank) -> None:
        self._bank = bank
        self._modules: list[nn.Module] = list(bank.base.modules())
        self._parameters = list(bank.base.parameters())
        self._learn = [p.requires_grad for p in self._parameters]

    def read(self) -> tuple[str | None, object, list[bool]]:
        """Active adapter as the bank has it and as the layers have it, and each module's mode."""
        return self._bank.active, self._bank._switch.seen(), [module.training for module in self._modules]

    def put_back(self, before: tuple[str | None, object, list[bool]]) -> list[str]:
        """Undo what differs from `before`; what that was, in words."""
        active, seen, modes = before
        undone = []
        if (self._bank.active, self._bank._switch.seen()) != (active, seen):
            self._bank.activate(active)
            undone.append("the active adapter")
        if [module.training for module in self._modules] != modes:
            for module, mode in zip(self._modules, modes, strict=True):
                module.training = mode
            undone.append("train mode")
        return undone + (["which weights learn"] if self.put_back_learning() else [])

    def put_back_learning(self) -> bool:
        """Undo changes of requires_grad; whether there were any."""
        if [p.requires_grad for p in self._parameters] == self._learn:
            return False
        for parameter, learns in zip(self._parameters, self._learn, strict=True):
            parameter.requires_grad_(learns)
        return True
