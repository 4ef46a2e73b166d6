"""AdapterBank: one frozen base, many named adapters, at most one active, each trainable or frozen for the whole run.

This is the only code that tells PEFT which adapter is active or trainable. Forward and backward of one adapter are
one indivisible block: with gradient checkpointing, backward recomputes through whatever adapter is active then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from marl_core.bank import heads, lora, reward_adapter
from marl_core.bank.parts import adapter_parameters
from marl_core.bank.reward_check import refuse_other_base
from marl_core.bank.switch import AdapterSwitch
from marl_core.bank.targets import Layers, linear_names, without_idle
from marl_core.bank.trunk import Trunk
from marl_core.bank.views import Position, ScoreView, View
from marl_core.errors import ConfigError, DataError
from marl_core.registry.strategy import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class AdapterBank:
    """One base model in memory and everything that is told apart by adapters and heads on it."""

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        source: str = "",
        quantization: Quantization | None = None,
    ) -> None:
        """Take over `base`: all its weights are frozen, its dropout is switched off for good."""
        self.tokenizer = tokenizer
        self.source = source or str(getattr(base, "name_or_path", ""))
        self.prepared = ""
        """What was done to the base before it was frozen, e.g. which adapter was merged in."""
        self.fingerprint: dict[str, list[float]] | None = None
        self.quantization = quantization or Quantization()
        self.trunk = Trunk(base)
        self._layers = linear_names(base, base.get_output_embeddings())
        self._measured = False
        self.heads: dict[str, nn.Linear] = {}
        self.reward_views: dict[str, ScoreView] = {}
        self.reward_checks: dict[str, str] = {}
        """What is known about each reward adapter's fit to this base, in a sentence."""
        self._peft: PeftModel | None = None
        self._switch = AdapterSwitch(base)
        self._active: str | None = None
        self._trainable: set[str] = set()
        self._paths: dict[str, Path] = {}
        base.requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls, path: str, *, dtype: str = "float32", tokenizer: str | None = None, device: str = "auto", **options: Any
    ) -> AdapterBank:
        """A bank on the model at `path`; `options` are those of marl_core.bank.base.load_bank."""
        from marl_core.bank.base import load_bank

        return load_bank(path, dtype=dtype, tokenizer=tokenizer, device=device, **options)

    @property
    def base(self) -> PreTrainedModel:
        """The causal language model, with the adapters injected."""
        return self.trunk.model

    @property
    def peft(self) -> PeftModel:
        """PEFT's wrapper. Don't call its set_adapter or disable_adapter: use `using` and `bare`."""
        if self._peft is None:
            raise ConfigError("This bank has no adapter yet; add or load one first.")
        return self._peft

    @property
    def device(self) -> torch.device:
        """Where the base lives."""
        return self.trunk.device

    @property
    def active(self) -> str | None:
        """The active adapter; None when the bare base is seen."""
        return self._active

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters, in the order they came."""
        return list(self._peft.peft_config) if self._peft is not None else []

    @property
    def linears(self) -> Layers:
        """Full names of the linear layers that a LoRA can adapt with effect, the LM head left out. Measured once."""
        if not self._measured:
            self._layers = without_idle(self._layers, self.base, self.trunk.try_all)
            self._measured = True
        return self._layers

    # -- adding ---------------------------------------------------------------------------------------------

    def add(self, name: str, config: LoraConfig, *, trainable: bool = True, seed: int | None = None) -> None:
        """A new adapter; its initial weights depend on `seed` alone, and the global random state stays as it was."""
        lora.check_name(name, {*self.adapters, *self.heads})
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            if seed is not None:
                torch.manual_seed(seed)
            try:
                self._peft = lora.inject(self._peft, self.base, name, config)
            finally:
                self._restore()
        if trainable:
            self._trainable.add(name)
        self._switch = AdapterSwitch(self.base)
        self._restore()
        self._try(name)

    def _try(self, name: str) -> None:
        """One small pass through a new adapter: a layer of the model that can't run with it is named at once."""
        try:
            with torch.no_grad(), self.using(name):
                self.trunk.try_out()
        except Exception as error:
            sentence = lora.odd_layer(self.base, name, error)
            self.remove(name)
            raise ConfigError(sentence) from error

    def load(
        self,
        name: str,
        path: str | Path,
        *,
        trainable: bool = False,
        dropout: float | None = None,
        asked_by: str = "adapter",
    ) -> None:
        """Load a PEFT LoRA adapter; frozen unless `trainable`. DataError unless every tensor finds its place.

        `dropout` replaces the LoRA dropout that the adapter was trained with.
        """
        files = lora.find_adapter(path, asked_by)
        lora.check_name(name, {*self.adapters, *self.heads})
        config = lora.config_of(files, self.linears, asked_by, getattr(self.base.config, "model_type", None))
        if trainable and files.score_keys:
            raise DataError(
                f"{asked_by}: {files.folder} is a reward adapter (it has a score head), not a policy to continue."
            )
        if trainable:
            config.task_type = "CAUSAL_LM"
        if dropout is not None:
            config.lora_dropout = dropout
        try:
            self.add(name, config, trainable=trainable, seed=0)
        except ConfigError as error:  # a file's layers are the file's, not the user's
            raise lora.cannot_stand(files, error, asked_by) from error
        try:
            lora.load_weights(self.peft, name, files, asked_by)
            if not files.score_keys:  # a reward adapter has a check of its own
                refuse_other_base(self, files, asked_by)
        except DataError:
            self.remove(name)
            raise
        self._paths[name] = files.folder.resolve()
        self._restore()

    def frozen(self, path: str | Path, role: str, asked_by: str = "adapter") -> str:
        """Name of the frozen adapter at `path`: loaded once, however many roles ask for it."""
        folder = lora.find_adapter(path, asked_by).folder.resolve()
        for name, known in self._paths.items():
            if known == folder and name not in self._trainable:
                return name
        name, number = role, 2
        while name in self.adapters:
            name, number = f"{role}-{number}", number + 1
        self.load(name, path, asked_by=asked_by)
        return name

    def load_reward(
        self,
        path: str | Path,
        *,
        position: Position | None = None,
        pad_id: int | None = None,
        asked_by: str = "reward.path",
    ) -> ScoreView:
        """A SEQ_CLS reward adapter as TRL's RewardTrainer writes it, with its score head, both frozen.

        Which token is scored comes from the adapter's certificate, else from the tokenizer saved beside it, as
        transformers' classifier would read it. DataError when the adapter was trained on other weights than these.
        """
        return reward_adapter.load(self, path, position, pad_id, asked_by)

    def add_value_head(self, name: str) -> nn.Linear:
        """A trainable value head, zero at the start."""
        lora.check_name(name, {*self.adapters, *self.heads})
        self.heads[name] = heads.new_value_head(self.trunk.hidden_size, self.device)
        return self.heads[name]

    def remove(self, name: str) -> None:
        """Take an adapter out of the bank, and a reward adapter's score head with it."""
        if self._active == name:
            self.activate(None)
        if self.adapters == [name]:
            self.peft.unload()
            self._peft = None
        else:
            self.peft.delete_adapter(name)
        self._trainable.discard(name)
        for known in (self._paths, self.reward_views, self.reward_checks):
            known.pop(name, None)
        self.heads.pop(f"{name}-score", None)
        self._switch = AdapterSwitch(self.base)
        self._restore()

    # -- looking through ------------------------------------------------------------------------------------

    @property
    def paths(self) -> dict[str, Path]:
        """Where each adapter that was loaded from disk came from."""
        return dict(self._paths)

    def activate(self, adapter: str | None) -> None:
        """Make `adapter` the active one until further notice; prefer the block form, `using`."""
        if adapter is not None and adapter not in self.adapters:
            raise ConfigError(f"This bank has no adapter {adapter!r}; it has: {', '.join(self.adapters) or 'none'}.")
        self._active = adapter
        self._switch.set(adapter)

    @contextmanager
    def using(self, adapter: str | None, *, train: bool = False) -> Iterator[PreTrainedModel]:
        """See the base through `adapter`, with its LoRA dropout on only if `train`. Afterwards all is as it was."""
        before = self._active
        self.activate(adapter)
        dropped = self._switch.set_dropout(adapter, train)  # gradient checkpointing puts the whole model in train mode
        try:
            yield self.base
        finally:
            self._switch.set_dropout(adapter, dropped)
            self.activate(before if before in self.adapters else None)

    def bare(self) -> Any:
        """See the base with every adapter off."""
        return self.using(None)

    def view(self, view: View) -> Any:
        """Open a View."""
        return self.using(view.adapter)

    # -- weights --------------------------------------------------------------------------------------------

    @property
    def trainable(self) -> frozenset[str]:
        """Adapters that are trained."""
        return frozenset(self._trainable)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of an adapter or head by name: what an optimizer gets."""
        if name in self.heads:
            return {f"{name}.{key}": value for key, value in self.heads[name].named_parameters()}
        found = adapter_parameters(self.base, name) if name in self.adapters else {}
        if not found:
            raise ConfigError(
                f"This bank has no adapter or head {name!r}; it has: {', '.join([*self.adapters, *self.heads])}."
            )
        return found

    def _restore(self) -> None:
        """Undo what a PEFT call did to the active adapter and to the trainable set."""
        self.base.requires_grad_(False)
        for name in self._trainable:
            for parameter in adapter_parameters(self.base, name).values():
                parameter.requires_grad_(True)
        if self._peft is not None:
            self._peft.train(self.base.training)
        self._switch.set(self._active)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """An adapter's tensors under PEFT's file names."""
        return lora.adapter_tensors(self.peft, name)

    def save(self, name: str, folder: Path) -> None:
        """Write an adapter in PEFT's own format, loadable without marl.

        On a prepared base (an adapter merged in) no base is named: `source` alone would be the wrong one.
        """
        lora.write_adapter(self.peft, name, folder, None if self.prepared else self.source)

    # -- scores ---------------------------------------------------------------------------------------------

    def score(self, view: ScoreView, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores of whole sequences: ids, mask [B, L], padded on either side -> [B] float32."""
        return reward_adapter.score(self, view, ids, mask)

    def compute_reward_score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        ppo_adapter_name: str | None = None,
        reward: ScoreView | None = None,
    ) -> Tensor:
        """The classic call: rewards [B] float32 of input_ids [B, L] from the reward adapter.

        Afterwards the policy `ppo_adapter_name` is active (or, without a name, whatever was before). `reward` picks
        among several reward adapters.
        """
        if ppo_adapter_name is not None and ppo_adapter_name not in self.adapters:
            have = ", ".join(self.adapters)
            raise ConfigError(f"ppo_adapter_name: this bank has no adapter {ppo_adapter_name!r}; it has: {have}.")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        view = reward or reward_adapter.only(self)
        scores = self.score(view, input_ids.to(self.device), mask.to(self.device))
        if ppo_adapter_name is not None:
            self.activate(ppo_adapter_name)
        return scores
