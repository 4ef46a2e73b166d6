"""Which layers of a base an adapter can adapt with effect, and what a user's targets mean among them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from peft import LoraConfig
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from marl_core.artifacts.architecture import leaves
from marl_core.artifacts.lora_targets import ALL_LINEAR, is_called, matches, unmatched
from marl_core.bank.out_of_memory import raise_if_out_of_memory
from marl_core.errors import ConfigError


class Layers(list[str]):
    """Full names of the linear layers that an adapter can adapt with effect; beside them all other names of the model."""

    def __init__(
        self, names: Iterable[str], *, idle: Iterable[str] = (), others: Iterable[str] = (), head: str | None = None
    ) -> None:
        """`idle`: linear layers that an adapter wouldn't change. `others`: every other module. `head`: the LM head."""
        super().__init__(names)
        self.idle, self.others, self.head = frozenset(idle), frozenset(others), head


def linear_names(base: nn.Module, head: nn.Module | None) -> Layers:
    """Full names of the base's linear layers but for its LM head, whatever adapters stand in it."""
    named = list(bare_modules(base))
    linear = [name for name, module in named if isinstance(module, nn.Linear | Conv1D) and module is not head]
    refused = {name for name in linear if _refused_by_peft(base, name)}
    return Layers(
        [name for name in linear if name not in refused],
        idle=refused,
        others=[name for name, _ in named if name not in set(linear)],
        head=next((name for name, module in named if module is head), None),
    )


def bare_modules(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules by name, without PEFT's."""
    wrapper = "\0"
    for name, module in base.named_modules():
        if name and not name.startswith(wrapper):  # a module comes right before what is in it
            if isinstance(module, BaseTunerLayer):
                wrapper = name + "."
            yield name, _bare(module)


def without_idle(layers: Layers, base: nn.Module, run: Callable[[], object]) -> Layers:
    """`layers` without those that an adapter can't change: the model reads their weight without calling them, or they give no tensor.

    Told by one pass, `run`. Experts that no token chose are not idle: of layers that differ by numbers alone one is enough.
    """
    called: set[str] = set()
    modules = dict(bare_modules(base))
    linear = {name: modules[name] for name in layers if name in modules}
    hooks = [module.register_forward_hook(_note(called, name)) for name, module in linear.items()]
    try:
        run()
    except Exception as error:  # a model that can't run says so where it is asked to
        raise_if_out_of_memory(error)
        return layers
    finally:
        for hook in hooks:
            hook.remove()
    kinds = {_kind(name) for name in called}
    idle = {name for name in linear if _kind(name) not in kinds}
    if len(idle) == len(linear):
        return layers
    kept = [name for name in layers if name not in idle]
    return Layers(kept, idle={*layers.idle, *idle}, others=layers.others, head=layers.head)


def expand_targets(targets: Any, linears: Iterable[str]) -> list[str]:
    """`all-linear`, a regular expression or a list, as names that can't match an already injected layer."""
    layers = linears if isinstance(linears, Layers) else Layers(linears)
    if targets == ALL_LINEAR:
        return sorted(set(_shortest(layers)))
    lost = unmatched(targets, layers)
    if isinstance(targets, str):
        if lost:
            raise ConfigError(f"LoRA targets {targets!r} match no linear layer of this base{_why(lost, layers)}.")
        return sorted(name for name in layers if matches(targets, name))
    if lost:
        raise ConfigError(f"LoRA targets {sorted(lost)} name no linear layer of this base{_why(lost, layers)}.")
    if not targets:
        raise ConfigError(f"LoRA targets {targets!r} match no linear layer of this base{_why([], layers)}.")
    return sorted(targets)


def _why(targets: Iterable[str], layers: Layers) -> str:
    idle = sorted(name for name in layers.idle if any(is_called(name, target) for target in targets))
    said = f" that an adapter can change: this model doesn't call {idle[0]} as a linear layer" if idle else ""
    return f"{said}. It has: {', '.join(leaves(layers))}"


def _shortest(layers: Layers) -> Iterator[str]:
    """Last parts where they name nothing else in the model, else full names."""
    elsewhere = {name.rsplit(".", 1)[-1] for name in (*layers.others, *layers.idle)}
    for name in layers:
        leaf = name.rsplit(".", 1)[-1]
        yield name if leaf in elsewhere else leaf


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _bare(module: nn.Module) -> nn.Module:
    """The model's own layer inside PEFT's."""
    layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return layer  # type: ignore[no-any-return]


def _note(called: set[str], name: str) -> Callable[..., None]:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):  # a router that gives a tuple is no linear layer to PEFT's wrapper
            called.add(name)

    return note


def _refused_by_peft(base: Any, name: str) -> bool:
    """Layers whose weight some models' kernels read by themselves: PEFT has a list, by model type."""
    check = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    if check is None:
        return False
    try:
        check(LoraConfig(), base, name.rsplit(".", 1)[-1])
    except ValueError:
        return True
    return False
