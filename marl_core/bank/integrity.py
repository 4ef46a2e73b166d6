"""What somebody else's code must leave alone in a bank: weights, who learns, who is active, train mode."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.identity.digest import digest
from marl_core.bank.parts import adapter_parameters
from marl_core.registry.snapshot import Setting, Snapshot


class WeightVersions:
    """Tensors by name and their version counters: torch counts every change in place. Looking costs microseconds.

    Changes through `.data` aren't counted; `checksum` sees those, and costs a reading of all weights.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        tensors = dict(named)
        self._names, self._tensors = list(tensors), list(tensors.values())
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
        digests = [digest(tensor) for tensor in self._tensors]  # all are started before one is waited for
        return sum(map(int, digests))


def frozen_weights(bank: AdapterBank) -> WeightVersions:
    """The base, the adapters that were read from disk and don't learn, and the frozen heads.

    An adapter that a strategy added for itself isn't among them: it may follow the policy.
    """
    known = {name for name in bank.paths if name not in bank.trainable}
    return WeightVersions(
        [*_outside(bank, {name for name in bank.adapters if name not in known}), *_heads(bank, False)]
    )


def learning_weights(bank: AdapterBank) -> WeightVersions:
    """Every adapter and head that learns."""
    trained = [pair for adapter in bank.trainable for pair in adapter_parameters(bank.base, adapter).items()]
    return WeightVersions([*trained, *_heads(bank, True)])


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


class ModeSnapshot:
    """Which parameters learn, which modules are in train mode, which adapter is active: read once, put back on demand."""

    def __init__(self, bank: AdapterBank) -> None:
        modules: list[nn.Module] = list(bank.base.modules())
        parameters = list(bank.base.parameters())

        def set_modes(modes: list[bool]) -> None:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode

        def set_learning(learn: list[bool]) -> None:
            for parameter, learns in zip(parameters, learn, strict=True):
                parameter.requires_grad_(learns)

        self._settings = (
            # as the bank has it and as the layers have it
            Setting(
                "the active adapter", lambda: (bank.active, bank._switch.seen()), lambda seen: bank.activate(seen[0])
            ),
            Setting("train mode", lambda: [module.training for module in modules], set_modes),
        )
        learning = Setting("which weights learn", lambda: [p.requires_grad for p in parameters], set_learning)
        self._learning = Snapshot.of([learning])

    def read(self) -> Snapshot:
        """The active adapter and each module's mode now."""
        return Snapshot.of(self._settings)

    def put_back(self, before: Snapshot) -> list[str]:
        """Undo what differs from `before`, and who learns that didn't at first; what that was, in words."""
        return [change.setting.name for change in (*before.put_back(), *self._learning.put_back())]

    def put_back_learning(self) -> bool:
        """Undo changes of requires_grad; whether there were any."""
        return bool(self._learning.put_back())
