"""Mounting: each adapter is a PeftModel of its own on the bare base, and its layers stand in the tree only while it is looked through.

PEFT holds adapters of several kinds on one model not at all, or wrongly: one PeftModel refuses other kinds, and kinds put around each
other compute something else (HRA passes by the layer below it) and write files that PEFT can't read. Made on the bare base, each is bitwise
what it is alone, "off" is the base itself, and what belongs to an adapter is told by identity: what came with it. A switch
replaces as many entries of the tree as layers are adapted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

PEFT_NAME = "default"
"""What PEFT calls every adapter: each is alone in its PeftModel, so the bank's names never meet PEFT's."""


class ChangedTree(Exception):
    """An adapter that changed the model in another way than by layers that can be taken out again; the text says which."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an adapter's layer stands: an attribute of a module of the base, the base's own layer, and the adapter's."""

    name: str
    """The layer's full name in the model."""
    parent: nn.Module
    attribute: str
    own: nn.Module
    layer: nn.Module


@dataclass(frozen=True, slots=True)
class _Held:
    """What one module of the base holds, by identity."""

    module: nn.Module
    children: dict[str, nn.Module | None]
    tensors: tuple[str, ...]
    computes: tuple[type, Any]
    hooks: tuple[frozenset[int], ...]

    @classmethod
    def of(cls, module: nn.Module) -> _Held:
        return cls(
            module,
            dict(module._modules),
            (*module._parameters, *module._buffers),
            (type(module), vars(module).get("forward")),
            tuple(frozenset(hooks) for hooks in _hooks(module)),
        )


class Tree:
    """A model as it stands: which module holds what under which attribute. Read once, compared with and put back later."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._held = {name: _Held.of(module) for name, module in model.named_modules()}
        self._attributes = frozenset(vars(model))

    @property
    def modules(self) -> set[nn.Module]:
        """All modules of the model."""
        return {held.module for held in self._held.values()}

    def places(self) -> list[Place]:
        """Where another module stands now than when this was read, in the order of the model's modules."""
        order = {held.module: number for number, held in enumerate(self._held.values())}
        found = [
            Place(f"{name}.{attribute}" if name else attribute, held.module, attribute, own, layer)
            for name, held in self._held.items()
            for attribute, own in held.children.items()
            if (layer := held.module._modules.get(attribute)) is not own and own is not None and layer is not None
        ]
        return sorted(found, key=lambda place: order[place.own])

    def put_back(self) -> None:
        """Every module under its attribute again; what else PEFT leaves behind is taken away.

        That is its config on the model, and a hook on the embeddings where gradient checkpointing is on: marl's needs none.
        """
        for held in self._held.values():
            held.module._modules.clear()
            held.module._modules.update(held.children)
        for attribute in set(vars(self._model)) - self._attributes:
            delattr(self._model, attribute)
        for held in self._held.values():
            if isinstance(held.module, nn.Embedding):
                for hooks, known in zip(_hooks(held.module), held.hooks, strict=True):
                    for key in [key for key in hooks if key not in known]:
                        del hooks[key]

    def changed(self) -> str | None:
        """What is different from when this was read, in words; None when nothing is. Weights' numbers aren't looked at."""
        for name, held in self._held.items():
            now = _Held.of(held.module)
            for what in ("children", "tensors", "computes", "hooks"):
                if getattr(now, what) != getattr(held, what):
                    return f"{_WORDS[what]} of {name or 'the model'}"
        return None


_WORDS = {"children": "the parts", "tensors": "the weights", "computes": "the forward pass", "hooks": "the hooks"}


def _hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The hooks of a module's passes, torch's own dicts."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks


class Mounted:
    """One adapter of a base, made of a config. Its layers are out of the tree until `put_on`."""

    def __init__(self, base: nn.Module, config: PeftConfig, never_learns: Sequence[str] = ()) -> None:
        """The base must be bare, and is so afterwards. `never_learns`: parameters that don't, whatever PEFT left them.

        Raises what PEFT raises, and ChangedTree; the tree is then as it was.
        """
        tree = Tree(base)
        self._base_modules = tree.modules
        self._base_tensors = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
        try:
            self.peft: Any = PeftModel(base, config, adapter_name=PEFT_NAME)
            self.places = tree.places()
            own = self._own_parameters()
            outside = [
                p for p in self.peft.parameters() if p.requires_grad and id(p) not in {*own, *self._base_tensors}
            ]
        finally:
            tree.put_back()
        other = tree.changed()
        if other is not None or outside:
            raise ChangedTree(
                f"it changes {other}, which stays when the adapter is off"
                if other
                else f"{len(outside)} of its weights learn outside of the model's layers, where no pass that marl makes would reach them"
            )
        self.modules = _unique(m for place in self.places for m in place.layer.modules() if m not in self._base_modules)
        """The adapter's own modules."""
        self.train(False)
        self._learns = {
            id(tensor)
            for (_, inner), tensor in own.values()
            if tensor.requires_grad and not set(inner.split(".")) & set(never_learns)
        }

    @property
    def config(self) -> Any:
        """PEFT's config of the adapter, not a copy."""
        return self.peft.peft_config[PEFT_NAME]

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The adapter's layers by the names that they have in the model while they stand in it."""
        return {place.name: place.layer for place in self.places}

    # -- standing in the tree -------------------------------------------------------------------------------

    def put_on(self) -> None:
        """Let the adapter's layers stand in the tree."""
        for place in self.places:
            place.parent._modules[place.attribute] = place.layer

    def take_off(self) -> None:
        """Let the base's own layers stand there."""
        for place in self.places:
            place.parent._modules[place.attribute] = place.own

    @property
    def stands(self) -> frozenset[bool]:
        """Whether its layers stand in the tree: true, false, or both where somebody changed some of them."""
        return frozenset(place.parent._modules.get(place.attribute) is place.layer for place in self.places)

    def switch_on(self) -> None:
        """Undo what PEFT's calls switched in its layers: on, with this adapter active."""
        for layer in self.layers.values():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(True)
                layer.set_adapter(PEFT_NAME)

    @property
    def settings(self) -> tuple[Any, ...]:
        """What PEFT's calls can switch in the adapter's layers: off or not, which is active, merged or not."""
        return tuple(
            (
                getattr(layer, "disable_adapters", None),
                str(getattr(layer, "active_adapters", None)),
                getattr(layer, "merged", None),
            )
            for layer in self.layers.values()
        )

    # -- weights --------------------------------------------------------------------------------------------

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """All parameters that came with the adapter, each once, by their names in the model with `name` in the place of PEFT's."""
        return {
            f"{place}.{'.'.join(name if part == PEFT_NAME else part for part in inner.split('.'))}": parameter
            for (place, inner), parameter in self._own_parameters().values()
        }

    def learning(self, name: str) -> dict[str, nn.Parameter]:
        """Those of them that PEFT left learning when it made the adapter: MiCA keeps one of its two factors as it is."""
        return {key: parameter for key, parameter in self.parameters(name).items() if id(parameter) in self._learns}

    def numbers(self) -> tuple[Any, ...]:
        """The plain numbers that the layers compute with beside their weights: scalings, ranks, alphas."""
        return tuple(
            (place, key, value[PEFT_NAME])
            for place, layer in self.layers.items()
            for key, value in sorted(vars(layer).items())
            if isinstance(value, dict) and isinstance(value.get(PEFT_NAME), int | float)
        )

    def _own_parameters(self) -> dict[int, tuple[tuple[str, str], nn.Parameter]]:
        """By identity: the layer and the name inside it under which a parameter is found first, and itself."""
        found: dict[int, tuple[tuple[str, str], nn.Parameter]] = {}
        for place in self.places:
            for inner, parameter in place.layer.named_parameters():
                if id(parameter) not in self._base_tensors:
                    found.setdefault(id(parameter), ((place.name, inner), parameter))
        return found

    def train(self, on: bool) -> bool:
        """Put what the adapter added, its dropout above all, in train or eval mode; whether it was in train mode."""
        was_on = any(module.training for module in self.modules)
        for module in self.modules:
            module.training = on
        return was_on

    # -- files: to be called while the adapter stands in the tree -------------------------------------------

    def file_tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors under the names PEFT gives them in a file, detached; parameters share memory with the model's."""
        held: dict[str, Tensor] = {}
        for path, module in self.peft.named_modules(remove_duplicate=False):
            if module not in self._base_modules:
                held |= {f"{path}.{key}": tensor for key, tensor in _kept(module)}
        tensors: dict[str, Tensor] = get_peft_model_state_dict(
            self.peft, state_dict=held, adapter_name=PEFT_NAME, save_embedding_layers=False
        )
        return {name: tensor.detach() for name, tensor in tensors.items()}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Put in what `file_tensors` gave, of the same names and shapes. ValueError where a tensor doesn't arrive."""
        mine = self.file_tensors()
        own = {pointer for module in self.modules for _, tensor in _kept(module) for pointer in (tensor.data_ptr(),)}
        if all(tensor.data_ptr() in own for tensor in mine.values()):
            for name, tensor in mine.items():
                tensor.copy_(tensors[name])
            return
        # what isn't a tensor of the layers, e.g. SHiRA's indices, PEFT alone knows where to put
        set_peft_model_state_dict(self.peft, {name: tensor.clone() for name, tensor in tensors.items()}, PEFT_NAME)
        lost = [
            name
            for name, tensor in self.file_tensors().items()
            if not torch.equal(tensor.cpu(), tensors[name].to(tensor.dtype).cpu())
        ]
        if lost:
            raise ValueError(f"peft doesn't put {lost[0]} back as it was saved")

    def learning_not_saved(self, name: str) -> list[str]:
        """The learning parameters that the adapter's file wouldn't hold."""
        kept = {tensor.data_ptr() for tensor in self.file_tensors().values()}
        return [key for key, parameter in self.learning(name).items() if parameter.data_ptr() not in kept]

    def fresh_config(self) -> PeftConfig:
        """A copy of the config with which such an adapter can be made again."""
        config: PeftConfig = deepcopy(self.config)
        config.inference_mode = False
        return config


def _kept(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own tensors that a state dict holds."""
    yield from ((name, parameter) for name, parameter in module._parameters.items() if parameter is not None)
    temporary = module._non_persistent_buffers_set
    yield from ((n, buffer) for n, buffer in module._buffers.items() if buffer is not None and n not in temporary)


def _unique(modules: Iterator[nn.Module]) -> list[nn.Module]:
    return list({id(module): module for module in modules}.values())
