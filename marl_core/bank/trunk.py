"""Trunk: the base as a function from tokens to hidden states, and from hidden states to log-probs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig

from marl_core.artifacts import architecture
from marl_core.bank import measure
from marl_core.bank.inputs import as_mask
from marl_core.bank.layers import decoder_layers
from marl_core.bank.out_of_memory import raise_if_out_of_memory
from marl_core.bank.room import learned_positions
from marl_core.bank.speed import cache, packing
from marl_core.bank.speed.compiled import cannot, compile_layers, refuse_what_rounds_elsewhere, stance
from marl_core.bank.speed.recompute import patch_for_recompute, unpatch
from marl_core.bank.stretched import Stretched
from marl_core.config.speed_config import is_on
from marl_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def position_ids(mask: Tensor) -> Tensor:
    """Positions that count real tokens only, so that padding on either side changes nothing; [B, L] int64."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


@dataclass(frozen=True, slots=True)
class PassOptions:
    """How passes go through a trunk. Runs that share one have each their own: see `Trunk.passing`."""

    pack: bool = True
    """Rows of unequal length without their padding, where the model allows it."""
    compiled: bool = False
    """Decoder layers compiled, in passes that keep no cache."""
    recompute: bool = False
    """Activations of a layer computed again in backward instead of kept (gradient checkpointing)."""
    recompute_cheap: bool | None = None
    """The cheap pieces between two products computed again (bank/speed/recompute.py); None: on a CPU alone, where that was measured."""
    short_attention: bool | None = None
    """Attention over short packed rows by explicit products (bank/speed/packing.py); None: on a CPU alone, likewise."""


class Trunk:
    """A frozen causal language model without dropout, split into trunk and LM head where that is exact.

    DataError for a model whose rows can't stand beside padding. It is always in eval mode: of what train mode switches on,
    router noise and other kernels would make old and new log-probs differ.
    """

    def __init__(self, model: PreTrainedModel, quantized: bool = False) -> None:
        self.model = model
        self.quantized = quantized
        """Whether the base's products are rounded more than its dtype says."""
        self.sharded = False
        """Whether the layers are spread over processes: then each pass needs all of them."""
        self.options = PassOptions()
        self._marked = False
        self._beside: list[nn.Module] = []
        """Layers of adapters, which stand in the model at times."""
        _remove_dropout(model)
        self._patched = False
        self._patch(self.options)
        model.eval()
        self.body = _body(model)
        self.stretched = Stretched(self.body)
        self.takes = _parameters(self.body)
        """Names that the body's forward takes."""
        self.head = _head(model)
        self._own_attention: str | None = getattr(model.config, "_attn_implementation", None)
        self._window = architecture.window(vars(model.config.get_text_config()))
        self.hidden_size, fault = self._measured()
        """Width of the hidden states that heads read."""
        if fault is not None:
            raise DataError(
                f"model: {type(model).__name__} can't be used: {fault}. marl computes rows of unequal length in one batch. "
                "Use a model whose rows stand beside padding."
            )

    def _measured(self) -> tuple[int, str | None]:
        """Width of the hidden states, and what is wrong with rows beside padding."""
        try:
            return measure.padding(self)
        except Exception as error:
            raise_if_out_of_memory(error)
            raise DataError(
                f"model: {type(self.model).__name__} can't compute a row of tokens here: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]} Its config.json may not fit its code, or a package that it needs is missing."
            ) from error

    @contextmanager
    def passing(self, options: PassOptions) -> Iterator[None]:
        """A block whose passes go as `options` say; afterwards as before."""
        before, self.options = self.options, options
        self._patch(options)
        try:
            yield
        finally:
            self.options = before
            self._patch(before)

    def _patch(self, options: PassOptions) -> None:
        """Give the modules the forwards that these options ask for, where they have others."""
        wanted = is_on(options.recompute_cheap, self.device.type)
        if wanted != self._patched:
            change: Callable[[nn.Module], object] = patch_for_recompute if wanted else unpatch
            for module in (self.model, *self._beside):
                change(module)
            self._patched = wanted

    def adapter_added(self, layers: Iterable[nn.Module]) -> None:
        """An adapter was added: its layers compute as the others do."""
        self._beside += layers
        if self._patched:
            for module in self._beside:
                patch_for_recompute(module)

    def adapter_removed(self, layers: Iterable[nn.Module]) -> None:
        """An adapter was removed: its layers will stand in the model no more."""
        gone = set(layers)
        self._beside = [module for module in self._beside if module not in gone]

    @property
    def device(self) -> torch.device:
        """Where the embeddings live."""
        device: torch.device = self._embedding.device
        return device

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self._embedding.shape[0])

    @cached_property
    def most_positions(self) -> int | None:
        """Most tokens of a row, where the model looks positions up in a table that ends."""
        return learned_positions(self.model)

    @property
    def _embedding(self) -> Any:
        return self.model.get_input_embeddings().weight

    @property
    def precision(self) -> str:
        """The dtype whose rounding products have: the base's own; of a float32 base what torch makes of float32 products now."""
        dtype = self.model.dtype
        return str(measure.float32_products(self.device) if dtype == torch.float32 else dtype).removeprefix("torch.")

    def precision_of(self, dtype: str) -> str:
        """The same for a run whose config asks for `dtype`: some models keep a few weights in float32 beside half precision."""
        return self.precision if dtype == "float32" else dtype

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states after the final norm: ids, mask [B, L] -> [B, L, H] in the base's dtype.

        Padded positions are not computed where the model allows packing; their hidden states are zero then.
        """
        mask = as_mask(mask, "mask", tuple(ids.shape))
        self._settle()
        packs = self.options.pack and mask.shape[1] <= self._window and self.packs
        states = self.packed_states if packs else self.padded_states
        return self._together(ids, mask, states)

    def _together(self, ids: Tensor, mask: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`compute` for rows [B, ...] that can share a pass, all of them in most models."""
        if self.stretched.until is None:
            return compute(ids, mask)
        groups = self.stretched.groups(mask.sum(dim=1).tolist(), one_each=self.sharded)
        results = []
        for rows in groups:
            self.stretched.forget()
            results.append(compute(ids[rows], mask[rows]))
        order = torch.tensor([row for rows in groups for row in rows], device=ids.device).argsort()
        return torch.cat(results)[order]

    def padded_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states of rows one below the other: ids, mask [B, L] -> [B, L, H], zero at padded positions.

        Each row goes to the left edge, its padding behind it. What is causal can't look there, so it needs neither mask nor
        positions: this is right for every causal model, those included that count positions by columns or carry a state. The
        width stays, however long the rows of a piece are, for products of other shapes round elsewhere; where rotary frequencies
        follow the width it is that of the longest row.
        """
        if bool(mask.all()):
            return self._run(ids, None, None)
        width = mask.shape[1] if self.stretched.until is None else int(mask.sum(dim=1).max())
        order = (~mask).long().argsort(dim=1, stable=True)[:, :width]
        states = self._run(torch.where(mask, ids, 0).gather(1, order), None, None)
        block = states.new_zeros(*mask.shape, states.shape[-1])
        block = block.scatter(1, order[..., None].expand_as(states), states)
        return block.masked_fill(~mask[..., None], 0.0)

    def masked_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states where the model itself is told of padding on the left, as in sampling: [B, L] -> [B, L, H]."""
        return self._run(ids, mask.long(), position_ids(mask))

    def packed_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states of rows packed into one: ids, mask [B, L] -> [B, L, H], zero at padded positions."""
        self._set_attention(self._packed_attention)
        if bool(mask.all()):
            return self._run(ids, None, None)
        layout = packing.Layout.of(mask)
        with packing.without_mask():
            states = self._run(ids[mask][None], None, position_ids(mask)[mask][None], layout=layout)
        block = states.new_zeros(*mask.shape, states.shape[-1])
        return block.masked_scatter(mask[..., None], states)

    def body_states(self, ids: Tensor) -> Tensor:
        """Hidden states of whole rows [B, L] as the model computes them when it is told nothing else."""
        return self._run(ids, None, None)

    def _run(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, **options: Any) -> Tensor:
        arguments = {"use_cache": False, **options, "attention_mask": mask, "position_ids": positions}
        for name in ("attention_mask", "position_ids", "use_cache"):
            if name not in self.takes:
                del arguments[name]
        caching = options.get("use_cache", False)
        with self._stance(sampling=caching), self._recomputing(not caching):
            output = self.body(input_ids=ids, **arguments)
        states: Tensor = output.last_hidden_state
        dtype: torch.dtype = self._embedding.dtype
        return states.to(dtype) if dtype.is_floating_point else states  # Mamba's residuals are float32 in any dtype

    def try_out(self) -> Tensor:
        """Hidden states [1, n, H] of a few tokens, uncompiled: shows whether the model runs, and what it calls.

        With a gradient: see `measure.with_gradient`.
        """
        with self.passing(PassOptions()), measure.with_gradient(self.model):
            return self.body_states(torch.arange(4, device=self.device)[None] % self.vocabulary).detach()

    def try_all(self) -> None:
        """The same tokens through the whole model, its head included."""
        with self.passing(PassOptions()), self._stance(sampling=True), measure.with_gradient(self.model):
            self.model(input_ids=torch.arange(4, device=self.device)[None] % self.vocabulary)

    def _set_attention(self, name: str | None) -> None:
        """Compute attention by this function of transformers' register from now on."""
        if name is not None and self.model.config._attn_implementation != name:
            if name in (packing.NAME, packing.SHORT_NAME):
                packing.register()
            self.model.set_attn_implementation(name)

    def _settle(self) -> None:
        """Before a pass: eval mode, whatever was done to the model in between, and the attention that the options want.

        That is the own function where rows are packed, else what the model was loaded with.
        """
        if self.model.training:
            self.model.eval()
        self.stretched.forget()
        self._set_attention(self._packed_attention if self.options.pack and self.packs else self._own_attention)

    @property
    def _packed_attention(self) -> str:
        """The own attention function, as the options want it for short rows."""
        return packing.attention_name(is_on(self.options.short_attention, self.device.type))

    @contextmanager
    def _recomputing(self, allowed: bool) -> Iterator[None]:
        """Inside, layers that can recompute do, if the options say so.

        transformers asks each layer whether it is in train mode. So the layers alone are, their parts stay in eval mode: a router's
        noise and quantized kernels see no difference.
        """
        wanted = self.options.recompute and allowed and torch.is_grad_enabled()
        with measure.training(self._recomputable if wanted else []):
            yield

    def prepare(self, options: PassOptions) -> PassOptions:
        """Make the trunk ready for passes with these options, once; what they will be. ConfigError where it can't be."""
        if options.recompute:
            _ = self._recomputable
        if options.pack:
            _ = self.packs
        if options.compiled:
            self._compile()
        return options

    def _compile(self) -> None:
        """Mark the decoder layers to be compiled, and try them."""
        layers = decoder_layers(self.body, "speed.compile", "speed.compile: false")
        refuse_what_rounds_elsewhere(layers)
        ids = torch.arange(4, device=self.device)[None] % self.vocabulary
        _ = self.packs, self.plain_head  # measured on the plain layers
        try:
            if not self._marked:
                compile_layers(layers)
            self._marked = True
            with torch.no_grad(), self.passing(PassOptions(compiled=True)):
                self._run(ids, None, None)
        except Exception as error:
            raise_if_out_of_memory(error)
            raise cannot(error) from error

    def _stance(self, sampling: bool) -> AbstractContextManager[Any]:
        """How marked layers run in one pass."""
        return stance(self.options.compiled and not sampling) if self._marked else nullcontext()

    def new_cache(self, room: int) -> DynamicCache:
        """An empty cache for rows of at most `room` tokens."""
        return cache.new_cache(self.model.config, room)

    def extend(self, ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """Hidden states of further tokens ids [B, n] after those in `cache`; mask [B, all so far] -> [B, n, H]."""
        self._settle()
        unpadded = bool(mask.all())
        positions = position_ids(mask)[:, -ids.shape[1] :].contiguous()
        return self._run(ids, None if unpadded else mask.long(), positions, use_cache=True, past_key_values=cache)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """The LM head alone, where `plain_head`: hidden [..., H] -> logits [..., V]."""
        logits: Tensor = self.head(hidden)
        return logits

    @property
    def packs(self) -> bool:
        """Whether rows can go through packed into one."""
        return self.packing_fault is None

    @cached_property
    def packing_fault(self) -> str | None:
        """Why rows can't be packed, in words; None when they can. Told from the model's parts, then measured, once."""
        if self._own_attention != "sdpa":
            return f"its attention is {self._own_attention}, not sdpa"
        before = self.model.config._attn_implementation
        try:
            with self.passing(PassOptions()):
                return measure.packing_fault(self)
        except Exception as error:  # a model of unknown make: whatever it can't do, the padded way remains
            raise_if_out_of_memory(error)
            return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        finally:
            self._set_attention(before)

    @cached_property
    def cache_fault(self) -> str | None:
        """Why the own decode loop can't be used, in words; None when it can. Measured once."""
        with self.passing(PassOptions()):
            return measure.cache_fault(self)

    @cached_property
    def generate_fault(self) -> str | None:
        """Why transformers' `generate` can't be used, in words; None when it can. Measured once."""
        with self.passing(PassOptions()):
            return measure.generate_fault(self)

    def sampler(self, wanted: Literal["marl", "transformers"]) -> Literal["marl", "transformers"]:
        """Who samples: the own decode loop if it is wanted and right for this model, else transformers' `generate`.

        DataError where that isn't right either.
        """
        own_fault = self.cache_fault if self.plain_head else "its logits are more than one product of its hidden states"
        if wanted == "marl" and not self.sharded and own_fault is None:
            return "marl"
        if not self.sharded and self.generate_fault is not None:
            way_out = "set speed.decode: marl" if own_fault is None else "use another model"
            raise DataError(
                f"model: {type(self.model).__name__} can't be sampled from in a batch: transformers' generate is wrong for it here "
                f"({self.generate_fault}){'' if own_fault is None else f', and so is the own loop ({own_fault})'}. To go on, {way_out}."
            )
        return "transformers"

    @cached_property
    def plain_head(self) -> bool:
        """Whether logits are exactly head(hidden); false for soft caps and scaled logits. Measured once.

        The same product of the same states: it differs by nothing, or by what the model does beside it.
        """
        if not isinstance(self.head, nn.Linear) or self.head.in_features != self.hidden_size:
            return False
        ids = torch.arange(4, device=self.device)[None] % self.vocabulary
        with torch.no_grad():
            logits = self.model(input_ids=ids).logits.float()
            product: Tensor = self.head(self.body_states(ids)).float()
        rounding = torch.finfo(
            self.head.weight.dtype if self.head.weight.dtype.is_floating_point else torch.float32
        ).eps
        return logits.shape == product.shape and bool(
            (logits - product).abs().max() <= rounding / 8 * logits.abs().max()
        )

    @cached_property
    def _recomputable(self) -> list[nn.Module]:
        """The modules that recompute in train mode; ConfigError when the model has none."""
        options = {"use_reentrant": False}
        try:
            if hasattr(self.model, "activation_checkpointing_enable"):  # its name since transformers 5.2x
                self.model.activation_checkpointing_enable(options)
            else:
                self.model.gradient_checkpointing_enable(options)
        except ValueError as error:
            raise ConfigError(
                f"model.gradient_checkpointing: {type(self.model).__name__} can't recompute its layers ({error}). "
                "Set it to false; ppo.microbatch: 1 saves memory too."
            ) from error
        layers = measure.outermost(
            self.model,
            lambda module: bool(getattr(module, "gradient_checkpointing", False)) and module is not self.body,
        )
        with self.passing(PassOptions()):  # those of the pass that asks want what is being measured
            fault = measure.recompute_fault(self, layers)
        if fault is not None:
            raise ConfigError(
                f"model.gradient_checkpointing: {type(self.model).__name__} is wrong when it recomputes its layers here: {fault}. "
                "Set it to false; ppo.microbatch: 1 saves memory too."
            )
        return layers

    @contextmanager
    def generating(self) -> Iterator[PreTrainedModel]:
        """The model as `generate` wants it, without sampling habits of its own.

        A model folder may bring penalties or cut-offs in its generation_config.json; what they sample is not what is scored.
        """
        self._settle()
        habits = self.model.generation_config
        self.model.generation_config = GenerationConfig()
        try:
            with self._stance(sampling=True):
                yield self.model
        finally:
            self.model.generation_config = habits

    def logits(self, ids: Tensor, mask: Tensor, last: int) -> Tensor:
        """Logits of the last `last` positions, [B, last, V]: the slow path for heads that aren't one matrix.

        Zero at padded positions; rows go through as in `padded_states`.
        """
        mask = as_mask(mask, "mask", tuple(ids.shape))
        self._settle()
        return self._together(ids, mask, lambda ids, mask: self._logits(ids, mask, last))

    def _logits(self, ids: Tensor, mask: Tensor, last: int) -> Tensor:
        order = (~mask).long().argsort(dim=1, stable=True)[:, : int(mask.sum(dim=1).max())]
        kept = order.shape[1] - int(mask[:, :-last].sum(dim=1).min())
        options = {"use_cache": False, "logits_to_keep": kept}
        takes = _parameters(self.model)
        with self._stance(sampling=False), self._recomputing(True):
            output = self.model(
                input_ids=torch.where(mask, ids, 0).gather(1, order),
                **{name: value for name, value in options.items() if name in takes},
            )
        logits: Tensor = output.logits[:, -kept:]
        places = order[:, -kept:, None].expand_as(logits)
        block = logits.new_zeros(*mask.shape, logits.shape[-1]).scatter(1, places, logits)
        return block[:, -last:].masked_fill(~mask[:, -last:, None], 0.0)


def _head(model: Any) -> nn.Module:
    head: nn.Module | None = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise DataError(
            f"model: {type(model).__name__} has no output embeddings (an LM head with one weight matrix), so it gives no "
            "log-probs that marl can compute. Use a causal language model."
        )
    return head


def _body(model: Any) -> nn.Module:
    """The model without its LM head: what gives the last hidden states. Wrappers that only pass on are looked through."""
    candidates = [getattr(model, model.base_model_prefix, None)]
    if hasattr(model, "get_decoder"):
        candidates.append(model.get_decoder())
    embedding = model.get_input_embeddings()
    candidates += [part for part in model.children() if any(module is embedding for module in part.modules())]
    parts = [part for part in candidates if isinstance(part, nn.Module) and part not in (model, embedding)]
    body = next((part for part in parts if "input_ids" in _parameters(part)), parts[0] if parts else None)
    if body is None:
        raise DataError(
            f"model: of {type(model).__name__} the part below the LM head can't be told: it has no {model.base_model_prefix!r} and no "
            "decoder. Use a causal language model that transformers knows."
        )
    return body


def _parameters(module: nn.Module) -> frozenset[str]:
    """Names that a module's forward takes, those that it would pass on unseen not counted."""
    return frozenset(inspect.signature(type(module).forward).parameters)


def _remove_dropout(model: nn.Module) -> None:
    """PPO's ratio is 1 only if the same weights give the same numbers twice: the frozen base never drops anything."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(module, name, 0.0)
