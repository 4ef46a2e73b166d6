"""What code that was called left behind: everything a strategy must leave as it was, and the names of what it didn't."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from marl_core.bank.adapters import AdapterBank


@dataclass(frozen=True)
class Traces:
    """State of a bank and of the process at one moment."""

    facts: dict[str, Any]
    """By a name for messages: what is compared with ==."""
    gradients: dict[str, bool]
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, bank: AdapterBank, without: Iterable[str] = ()) -> Traces:
        """Take everything down, but for the weights of the adapters `without`."""
        import numpy
        import torch

        facts = {
            "the active adapter": bank.active,
            "the set of trainable adapters": sorted(bank.trainable),
            "the adapters in the bank": bank.adapters,
            "train or eval mode": bank.base.training,
            "torch's random state": torch.get_rng_state().numpy().tobytes(),
            "Python's random state": random.getstate(),
            "numpy's random state": _plain(numpy.random.get_state()),
            "torch.is_grad_enabled": torch.is_grad_enabled(),
            "torch's default dtype": torch.get_default_dtype(),
            "torch's number of threads": torch.get_num_threads(),
            "the tokenizer's padding side": bank.tokenizer.padding_side,
            "the tokenizer's pad token": bank.tokenizer.pad_token,
            "the tokenizer's vocabulary": len(bank.tokenizer),
        }
        parameters = dict(bank.base.named_parameters())
        left_out = {key for name in without for key in bank.parameters(name)}
        gradients = {name: parameter.requires_grad for name, parameter in parameters.items()}
        heads = {f"{name}.{key}": p for name, head in bank.heads.items() for key, p in head.named_parameters()}
        kept = {name: tensor for name, tensor in {**parameters, **heads}.items() if name not in left_out}
        weights = {name: tensor.detach().clone() for name, tensor in kept.items()}
        return cls(facts, gradients, weights)

    def changed(self, after: Traces) -> list[str]:
        """A clause for everything that is different afterwards, the most telling first."""
        found = [
            name + _values(value, after.facts[name]) for name, value in self.facts.items() if value != after.facts[name]
        ]
        found += _first("requires_grad of", [n for n, flag in self.gradients.items() if after.gradients.get(n) != flag])
        kept = {name for name, old in self.weights.items() if _equal(old, after.weights.get(name))}
        return found + _first("the weights of", [name for name in self.weights if name not in kept])


def _equal(old: Tensor, new: Tensor | None) -> bool:
    import torch

    return new is not None and torch.equal(old, new)


def _plain(state: Any) -> Any:
    return tuple(part.tobytes() if hasattr(part, "tobytes") else part for part in state)


def _values(before: Any, after: Any) -> str:
    short = all(isinstance(value, str | bool | int | list | None) for value in (before, after))
    return f" ({before!r} became {after!r})" if short else ""


def _first(what: str, names: list[str]) -> list[str]:
    return [f"{what} {names[0]}" + (f" and of {len(names) - 1} more" if len(names) > 1 else "")] if names else []
