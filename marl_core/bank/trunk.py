"""Trunk: the base as a function from tokens to hidden states, and from hidden states to log-probs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from marl_core.bank import attention
from marl_core.bank.compiled import cannot, compile_layers, stance
from marl_core.bank.layers import decoder_layers
from marl_core.bank.lean import keep_less

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PACKED_ERROR = 0.05
"""Relative difference that rounding may make in half precision; a row that sees its neighbours is off by about one."""


def position_ids(mask: Tensor) -> Tensor:
    """Positions that count real tokens only, so that padding on either side changes nothing; [B, L] int64."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _window(config: Any) -> int:
    """Tokens that every layer sees at least: packed rows carry no window, so longer ones stay padded."""
    sizes = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((size for size in sizes if isinstance(size, int)), default=2**62)


class Trunk:
    """A frozen causal language model without dropout, split into trunk and LM head where that is exact."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.sharded = False
        """Whether the layers are spread over processes: then each pass needs all of them."""
        _remove_dropout(model)
        keep_less(model)
        model.eval()
        self._body: nn.Module = getattr(model, model.base_model_prefix, model)
        self.head: nn.Module = model.get_output_embeddings()
        self._hidden_size: int | None = None
        self._plain: bool | None = None
        self._packs: bool | None = None
        self._window = _window(model.config.get_text_config())
        self.pack = True
        """Whether rows of unequal length go through the trunk without their padding, where the model allows it."""
        self.compiled = False
        """Whether passes that keep no cache run compiled; `compile` says so."""
        self._marked = False
        self.positions = 0
        """Token positions computed so far, padding included: benchmarks compare them with the real ones."""

    @property
    def device(self) -> torch.device:
        """Where the embeddings live."""
        device: torch.device = self._embedding.device
        return device

    @property
    def body(self) -> nn.Module:
        """The model without its LM head: what gives the last hidden states."""
        return self._body

    @property
    def hidden_size(self) -> int:
        """Width of the last hidden states, which may be another than the LM head's. Measured once."""
        if self._hidden_size is None:
            with torch.no_grad():
                self._hidden_size = self.try_out().shape[-1]
        return self._hidden_size

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self._embedding.shape[0])

    @property
    def _embedding(self) -> Any:
        return self.model.get_input_embeddings().weight

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states after the final norm: ids, mask [B, L] -> [B, L, H] in the base's dtype.

        Padded positions are not computed where the model allows packing; their hidden states are zero then.
        """
        if not (self.pack and mask.shape[1] <= self._window and self.packs):
            return self._run(ids, mask.long(), position_ids(mask))
        return self._run(ids, None, None) if bool(mask.all()) else self._packed(ids, mask)

    def _run(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, **options: Any) -> Tensor:
        self.positions += ids.numel()
        options = {"use_cache": False, **options}
        with self._stance(sampling=options["use_cache"]):
            output = self._body(input_ids=ids, attention_mask=mask, position_ids=positions, **options)
        states: Tensor = output.last_hidden_state
        return states

    def try_out(self) -> Tensor:
        """Hidden states [1, n, H] of a few tokens, uncompiled: shows whether the model runs, and what it calls."""
        (compiled, positions), self.compiled = (self.compiled, self.positions), False
        try:
            return self._run(torch.arange(4, device=self.device)[None] % self.vocabulary, None, None)
        finally:
            self.compiled, self.positions = compiled, positions

    def try_all(self) -> None:
        """The same tokens through the whole model, its head included."""
        with self._stance(sampling=True):
            self.model(input_ids=torch.arange(4, device=self.device)[None] % self.vocabulary, use_cache=False)

    def compile(self, on: bool) -> None:
        """Run the decoder layers compiled from now on, or plain; ConfigError where they can't be."""
        self.compiled = False
        if not on:
            return
        layers = decoder_layers(self._body, "speed.compile", "speed.compile: false")
        ids = torch.arange(4, device=self.device)[None] % self.vocabulary
        _ = self.packs, self.plain_head  # measured on the plain layers
        try:
            if not self._marked:
                compile_layers(layers)
            self._marked = self.compiled = True
            with torch.no_grad():
                self._run(ids, None, None)
        except Exception as error:
            self.compiled = False
            raise cannot(error) from error

    def _stance(self, sampling: bool) -> AbstractContextManager[Any]:
        """How marked layers run in one pass."""
        return stance(self.compiled and not sampling) if self._marked else nullcontext()

    def _packed(self, ids: Tensor, mask: Tensor) -> Tensor:
        layout = attention.Layout.of(mask)
        with attention.Packing():
            states = self._run(ids[mask][None], None, position_ids(mask)[mask][None], layout=layout)
        block = states.new_zeros(*mask.shape, states.shape[-1])
        return block.masked_scatter(mask[..., None], states)

    def extend(self, ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """Hidden states of further tokens ids [B, n] after those in `cache`; mask [B, all so far] -> [B, n, H]."""
        whole = bool(mask.all())
        positions = position_ids(mask)[:, -ids.shape[1] :]
        return self._run(ids, None if whole else mask.long(), positions, use_cache=True, past_key_values=cache)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """The LM head alone, where `plain_head`: hidden [..., H] -> logits [..., V]."""
        logits: Tensor = self.head(hidden)
        return logits

    @property
    def packs(self) -> bool:
        """Whether packed rows give what padded ones give: a model with sdpa attention and no windows. Measured once."""
        if self._packs is None:
            self._packs = self._try_packing()
        return self._packs

    def _try_packing(self) -> bool:
        if getattr(self.model.config, "_attn_implementation", None) != "sdpa":
            return False
        ids = torch.arange(12, device=self.device).reshape(2, 6) % self.vocabulary
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]], dtype=torch.bool, device=self.device)
        with torch.no_grad():
            padded = self._run(ids, mask.long(), position_ids(mask))[mask].float()
            try:
                self.model.set_attn_implementation(attention.NAME)
                packed = self._packed(ids, mask)[mask].float()
            except Exception:  # a model of unknown make: whatever it can't do, the padded way remains
                self.model.set_attn_implementation("sdpa")
                return False
        same = torch.linalg.vector_norm(packed - padded) < PACKED_ERROR * torch.linalg.vector_norm(padded)
        if not bool(same):
            self.model.set_attn_implementation("sdpa")
        return bool(same)

    @property
    def plain_head(self) -> bool:
        """Whether logits are exactly head(hidden); false for soft caps and scaled logits. Measured once."""
        if self._plain is None:
            ids = torch.arange(4, device=self.device)[None] % self.model.config.get_text_config().vocab_size
            mask = torch.ones_like(ids)
            with torch.no_grad():
                whole = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                split = self.head(self._run(ids, mask, None))
            self._plain = isinstance(self.head, nn.Linear) and torch.allclose(
                whole.float(), split.float(), atol=1e-3, rtol=1e-3
            )
        return self._plain

    @property
    def stateful(self) -> bool:
        """Whether the model keeps something else than growing keys and values: then only transformers knows how."""
        layers = DynamicCache(config=self.model.config).layers
        return not layers or any(type(layer) is not DynamicLayer for layer in layers)

    @contextmanager
    def generating(self) -> Iterator[PreTrainedModel]:
        """The model as `generate` wants it: a cache instead of gradient checkpointing, and no sampling habits of its own.

        A model folder may bring penalties or cut-offs in its generation_config.json; what they sample is not what is scored.
        """
        training, habits = self.model.training, self.model.generation_config
        self.model.eval()
        self.model.generation_config = GenerationConfig()
        try:
            with self._stance(sampling=True):
                yield self.model
        finally:
            self.model.generation_config = habits
            self.model.train(training)

    def logits(self, ids: Tensor, mask: Tensor, last: int) -> Tensor:
        """Logits of the last `last` positions, [B, last, V]: the slow path for heads that aren't one matrix."""
        with self._stance(sampling=False):
            output = self.model(
                input_ids=ids,
                attention_mask=mask.long(),
                position_ids=position_ids(mask),
                use_cache=False,
                logits_to_keep=last,
            )
        logits: Tensor = output.logits
        return logits

    def checkpoint_gradients(self) -> None:
        """Recompute activations in backward. transformers does so in train mode only, which is safe without dropout."""
        options = {"use_reentrant": False}
        if hasattr(self.model, "activation_checkpointing_enable"):  # its name since transformers 5.2x
            self.model.activation_checkpointing_enable(options)
        else:
            self.model.gradient_checkpointing_enable(options)
        self.model.train()


def _remove_dropout(model: nn.Module) -> None:
    """PPO's ratio is 1 only if the same weights give the same numbers twice: the frozen base never drops anything."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(module, name, 0.0)
