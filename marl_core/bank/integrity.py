"""What somebody else's code must leave alone in a bank: weights, who learns, who is active, train mode."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.weight_versions import WeightVersions
from marl_core.registry.snapshot import Setting, Snapshot


def frozen_weights(bank: AdapterBank) -> WeightVersions:
    """The base, the adapters that were read from disk and don't learn, and the frozen heads.

    An adapter that a strategy added for itself isn't among them: it may follow the policy.
    """
    frozen = dict(bank.base_parameters())
    for name in bank.paths:
        if name not in bank.trainable:
            frozen |= bank.adapter_parameters(name)
    return WeightVersions([*frozen.items(), *_heads(bank, False)])


def learning_weights(bank: AdapterBank) -> WeightVersions:
    """Every adapter and head that learns."""
    trained = [pair for adapter in bank.trainable for pair in bank.adapter_parameters(adapter).items()]
    return WeightVersions([*trained, *_heads(bank, True)])


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
        modules: list[nn.Module] = bank.all_modules()
        parameters = list(bank.all_parameters().values())

        def set_modes(modes: list[bool]) -> None:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode

        def set_learning(learn: list[bool]) -> None:
            for parameter, learns in zip(parameters, learn, strict=True):
                parameter.requires_grad_(learns)

        self._settings = (
            # as the bank has it and as the layers have it
            Setting("the active adapter", lambda: (bank.active, bank.seen), lambda seen: bank.see_again(seen[0])),
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
