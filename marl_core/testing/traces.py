"""What a call changed: a snapshot of everything that a strategy must leave as it was, and the names of what differs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from marl_core.registry.snapshot import Change, Setting, Snapshot, random_states, torch_modes

if TYPE_CHECKING:
    from torch import Tensor

    from marl_core.bank.adapters import AdapterBank


@dataclass(frozen=True)
class Traces:
    """State of a bank and of the process at one moment."""

    settings: Snapshot
    gradients: dict[str, bool]
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, bank: AdapterBank, without: Iterable[str] = ()) -> Traces:
        """The state now, except the weights of the adapters `without`."""
        settings = Snapshot.of([*_of_bank(bank), *random_states(), *torch_modes()])
        parameters = bank.all_parameters()
        left_out = {key for name in without for key in bank.parameters(name)}
        gradients = {name: parameter.requires_grad for name, parameter in parameters.items()}
        heads = {f"{name}.{key}": p for name, head in bank.heads.items() for key, p in head.named_parameters()}
        tensors = {name: tensor for name, tensor in {**parameters, **heads}.items() if name not in left_out}
        weights = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return cls(settings, gradients, weights)

    def changed(self, after: Traces) -> list[str]:
        """A clause for everything that is different afterwards, the most telling first."""
        changes = [change.setting.name + _values(change) for change in self.settings.changes(after.settings)]
        changes += _first(
            "requires_grad of", [n for n, flag in self.gradients.items() if after.gradients.get(n) != flag]
        )
        unchanged = {name for name, old in self.weights.items() if _equal(old, after.weights.get(name))}
        return changes + _first("the weights of", [name for name in self.weights if name not in unchanged])


def _equal(old: Tensor, new: Tensor | None) -> bool:
    import torch

    return new is not None and torch.equal(old, new)


def _of_bank(bank: AdapterBank) -> list[Setting]:
    """What a bank and its tokenizer are set to."""
    tokenizer = bank.tokenizer
    return [
        Setting("the active adapter", lambda: bank.active),
        Setting("the set of trainable adapters", lambda: sorted(bank.trainable)),
        Setting("the adapters in the bank", lambda: bank.adapters),
        Setting("train or eval mode", lambda: bank.base.training),
        Setting("the tokenizer's padding side", lambda: tokenizer.padding_side),
        Setting("the tokenizer's pad token", lambda: tokenizer.pad_token),
        Setting("the tokenizer's vocabulary", lambda: len(tokenizer)),
    ]


def _values(change: Change) -> str:
    short = all(isinstance(value, str | bool | int | list | None) for value in (change.before, change.now))
    return f" ({change.before!r} became {change.now!r})" if short else ""


def _first(what: str, names: list[str]) -> list[str]:
    return [f"{what} {names[0]}" + (f" and of {len(names) - 1} more" if len(names) > 1 else "")] if names else []
