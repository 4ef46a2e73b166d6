"""AdapterBank: one frozen base, many named adapters, at most one active, each trainable or frozen for the whole run.

This is the only code that tells PEFT which adapter is active or trainable. Forward and backward of one adapter are
one indivisible block: with gradient checkpointing, backward recomputes through whatever adapter is active then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from marl_core.bank import heads, lora
from marl_core.bank.guard import BaseGuard, Look, Mark, take_out_the_rest, unusual
from marl_core.bank.identity import reward_adapter
from marl_core.bank.identity.fingerprint import Fingerprint, kinds
from marl_core.bank.identity.reward_check import check_base
from marl_core.bank.identity.which_base import Origin
from marl_core.bank.inputs import as_ids, as_mask, require_room, require_tokens, without_garbage
from marl_core.bank.out_of_memory import raise_if_out_of_memory
from marl_core.bank.parts import adapter_parameters
from marl_core.bank.switch import AdapterSwitch
from marl_core.bank.targets import Layers, linear_names, without_idle
from marl_core.bank.trunk import PassOptions, Trunk
from marl_core.bank.views import Position, ScoreView, View
from marl_core.errors import ConfigError, DataError
from marl_core.registry.strategy import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


OTHER_TOKENIZER_OUTPUTS = {
    "token_type_ids",
    "special_tokens_mask",
    "length",
    "offset_mapping",
    "overflow_to_sample_mapping",
    "num_truncated_tokens",
}
"""What tokenizers return beside ids and mask."""


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
        self.fingerprint: Fingerprint | None = None
        """Record of the base's weights (marl_core.bank.identity.fingerprint); None where none was made."""
        self.origin: Origin | None = None
        """Where the base was read from, when it is still as it was read."""
        self.quantization = quantization or Quantization()
        self.trunk = Trunk(base, quantized=self.quantization.config is not None)
        self._layers = linear_names(base, base.get_output_embeddings())
        self._measured = False
        self.heads: dict[str, nn.Linear] = {}
        self.reward_views: dict[str, ScoreView] = {}
        self.reward_checks: dict[str, str] = {}
        """What is known about each reward adapter's fit to this base, in a sentence."""
        self.base_checks: dict[str, str] = {}
        """The same of each other adapter that was read from disk."""
        self._peft: PeftModel | None = None
        self._switch = AdapterSwitch(base)
        self._active: str | None = None
        self._trainable: set[str] = set()
        self._paths: dict[str, Path] = {}
        self._guard = BaseGuard(base)
        self._read_as: dict[str, Mark] | None = None
        self._spoiled = ""
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
        """PEFT's wrapper. Don't call its set_adapter or disable_adapter: use `using` and `bare`.

        ConfigError while the bank has no adapter: there is none to wrap.
        """
        if self._peft is None:
            raise ConfigError("This bank has no adapter yet; add or load one first.")
        return self._peft

    @property
    def device(self) -> torch.device:
        """Where the base lives."""
        return self.trunk.device

    def note_read(self, origin: Origin | None, prints: Fingerprint | None) -> None:
        """Where the base comes from and what it is, from now on as long as nobody writes to it."""
        self.origin, self.fingerprint, self._read_as = origin, prints, self._guard.marks()

    @property
    def as_read(self) -> bool:
        """Whether origin and fingerprint still hold: the base was read by load_bank, and nobody wrote to it since."""
        return self._read_as is not None and self._read_as == self._guard.marks()

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
        """A new adapter; its initial weights depend on `seed` alone, and the global random state stays as it was.

        ConfigError when making or training it would change the base, which is then as it was.
        """
        if not isinstance(config, LoraConfig):
            raise ConfigError(
                f"adapter {name!r}: a bank holds LoRA adapters: give a peft.LoraConfig, not a {type(config).__name__}."
            )
        wrong = lora.changing(config)
        if wrong:
            raise ConfigError(f"adapter {name!r}: {wrong}, and all roles share the base. {lora.PLAIN}")
        changed = self._insert(name, config, trainable, seed, lambda: None)
        if changed:
            raise ConfigError(f"adapter {name!r}: {changed}")

    def _insert(
        self, name: str, config: LoraConfig, trainable: bool, seed: int | None, fill: Callable[[], None]
    ) -> str:
        """Inject an adapter and fill its weights. What is wrong when that changed the base; then it isn't in the bank."""
        self._refuse_when_spoiled()
        lora.check_name(name, {*self.adapters, *self.heads})
        before = self._guard.look()
        try:
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
            self.trunk.adapter_added()
            lora.refuse_output_layer(self.base, name)
            lora.refuse_unreadable(self._peft, name)
            self._try(name)
            fill()
        except Exception:
            self._undo(name, before)
            raise
        changed = self._guard.changed(before)
        if not changed:
            return ""
        self._undo(name, before)
        after = "it can't be put back, so this bank can't be used any more" if self._spoiled else "it has been put back"
        return (
            f"peft rewrote the base's weights ({kinds(changed)}), which all roles share; {after}, and the adapter isn't "
            f"added. Of its options: {unusual(config)}. {lora.PLAIN}"
        )

    def _try(self, name: str) -> None:
        """One small pass through a new adapter: a layer of the model that can't run with it is named at once."""
        try:
            with self.using(name):
                self.trunk.try_out()
        except Exception as error:
            raise_if_out_of_memory(error)
            raise ConfigError(lora.odd_layer(self.base, name, error)) from error

    def _undo(self, name: str, before: Look) -> None:
        """Take out an adapter, whole or in part, and give the base back what it held."""
        if name in self.adapters:
            self.remove(name)
        take_out_the_rest(self.base, name)
        self._trainable.discard(name)
        self._switch = AdapterSwitch(self.base)
        self._restore()
        if not (self._guard.put_back(before) or self._read_again(before)):
            self._spoiled = f"making the adapter {name!r} changed the base's weights, and what they were is lost"

    def _read_again(self, before: Look) -> bool:
        """Take what was written over from the files; whether the base is as it was."""
        from marl_core.bank.base import load_base

        plain = self.quantization.config is None and not self.trunk.sharded
        if self.origin is None or self.origin.folder is None or not plain:
            return False
        try:
            source = load_base(str(self.origin.folder), dtype=str(self.base.dtype).removeprefix("torch."))
        except DataError:
            return False
        return self._guard.put_back_from(source, before)

    def _refuse_when_spoiled(self) -> None:
        if self._spoiled:
            raise ConfigError(f"This bank can't be used: {self._spoiled}. Load the base again.")

    def load(
        self,
        name: str,
        path: str | Path,
        *,
        trainable: bool = False,
        dropout: float | None = None,
        asked_by: str = "adapter",
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> None:
        """Load a PEFT LoRA adapter; frozen unless `trainable`. DataError unless every tensor finds its place.

        `dropout` replaces the LoRA dropout that the adapter was trained with. `revision` is that of a hub name (branch,
        tag or commit), `subfolder` the folder inside `path` that holds the adapter, as peft calls them.
        """
        files = lora.find_adapter(path, asked_by, revision, subfolder)
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
            changed = self._insert(
                name, config, trainable, 0, lambda: lora.load_weights(self.peft, name, files, asked_by)
            )
        except ConfigError as error:  # a file's layers are the file's, not the user's
            raise lora.cannot_stand(files, error, asked_by) from error
        if changed:
            raise DataError(f"{asked_by}: {files.folder}: {changed}")
        if not files.score_keys:  # a reward adapter has a check of its own
            try:
                self.base_checks[name] = check_base(self, files, asked_by)
            except DataError:
                self.remove(name)
                raise
        self._paths[name] = files.folder.resolve()
        self._restore()

    def frozen(
        self,
        path: str | Path,
        role: str,
        asked_by: str = "adapter",
        *,
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Name of the frozen adapter at `path`, as `load` takes it: loaded once, however many roles ask for it."""
        folder = lora.find_adapter(path, asked_by, revision, subfolder).folder.resolve()
        for name, known in self._paths.items():
            if known == folder and name not in self._trainable:
                return name
        name, number = role, 2
        while name in self.adapters:
            name, number = f"{role}-{number}", number + 1
        self.load(name, path, asked_by=asked_by, revision=revision, subfolder=subfolder)
        return name

    def load_reward(
        self,
        path: str | Path,
        *,
        position: Position | None = None,
        pad_id: int | None = None,
        asked_by: str = "reward.path",
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> ScoreView:
        """A SEQ_CLS reward adapter as TRL's RewardTrainer writes it, with its score head, both frozen.

        Which token is scored comes from the adapter's certificate, else from the tokenizer saved beside it, as
        transformers' classifier would read it. DataError when the adapter was trained on other weights than these.
        `revision` and `subfolder` as in `load`.
        """
        return reward_adapter.load(self, path, position, pad_id, asked_by, revision, subfolder)

    def add_value_head(self, name: str) -> nn.Linear:
        """A trainable value head, zero at the start."""
        lora.check_name(name, {*self.adapters, *self.heads})
        self.heads[name] = heads.new_value_head(self.trunk.hidden_size, self.device)
        return self.heads[name]

    def remove(self, name: str) -> None:
        """Take an adapter out of the bank, and the score or value head that stands on it with it; or a head alone.

        ConfigError when the bank has neither.
        """
        if name in self.heads:
            del self.heads[name]
            return
        self._require(name)
        if self._active == name:
            self.activate(None)
        if self.adapters == [name]:
            self.peft.unload()
            self._peft = None
        else:
            self.peft.delete_adapter(name)
            if self.peft.active_adapter == name:  # peft would look for the config of the one that is gone
                self.peft.active_adapter = self.adapters[0]
        self._trainable.discard(name)
        for known in (self._paths, self.reward_views, self.reward_checks, self.base_checks):
            known.pop(name, None)
        for head in (heads.score_head_of(name), heads.value_head_of(name)):
            self.heads.pop(head, None)
        self._switch = AdapterSwitch(self.base)
        self._restore()

    # -- looking through ------------------------------------------------------------------------------------

    @property
    def paths(self) -> dict[str, Path]:
        """Where each adapter that was loaded from disk came from."""
        return dict(self._paths)

    def activate(self, adapter: str | None) -> None:
        """Make `adapter` the active one until further notice, None: the bare base; prefer the block form, `using`.

        ConfigError for an adapter that isn't there, and for a bank whose base was changed and couldn't be put back.
        """
        if adapter is not None:
            self._require(adapter)
        self._refuse_when_spoiled()
        self._active = adapter
        self._switch.set(adapter)

    @contextmanager
    def using(
        self, adapter: str | None, *, train: bool = False, options: PassOptions | None = None
    ) -> Iterator[PreTrainedModel]:
        """See the base through `adapter`, with its LoRA dropout on only if `train`. Afterwards all is as it was.

        `options`: how the passes inside go through the base; None: as those around the block do.
        """
        before = self._active
        self.activate(adapter)
        dropped = self._switch.set_dropout(adapter, train)  # gradient checkpointing puts the whole model in train mode
        try:
            with nullcontext() if options is None else self.trunk.passing(options):
                yield self.base
        finally:
            self._switch.set_dropout(adapter, dropped)
            self.activate(before if before in self.adapters else None)

    def bare(self) -> Any:
        """See the base with every adapter off."""
        return self.using(None)

    def view(self, view: View, options: PassOptions | None = None) -> Any:
        """Open a View; `options` as in `using`."""
        return self.using(view.adapter, options=options)

    # -- weights --------------------------------------------------------------------------------------------

    @property
    def trainable(self) -> frozenset[str]:
        """Adapters that are trained."""
        return frozenset(self._trainable)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of an adapter or head by name, float32: what an optimizer gets. ConfigError when the bank has neither."""
        if name in self.heads:
            return {f"{name}.{key}": value for key, value in self.heads[name].named_parameters()}
        parameters = adapter_parameters(self.base, name) if name in self.adapters else {}
        if not parameters:
            raise ConfigError(
                f"This bank has no adapter or head {name!r}; it has: {', '.join([*self.adapters, *self.heads])}."
            )
        return parameters

    def checksum(self, *names: str) -> int:
        """A number of the bits of these adapters and heads: any change of their weights or scaling, however made, shows in it."""
        from marl_core.bank.integrity import WeightVersions

        weights = WeightVersions(pair for name in names for pair in self.parameters(name).items())
        return hash((weights.checksum(), *(self._switch.scalings(name) for name in names)))

    def _require(self, adapter: str) -> None:
        if adapter not in self.adapters:
            raise ConfigError(f"This bank has no adapter {adapter!r}; it has: {', '.join(self.adapters) or 'none'}.")

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
        """An adapter's tensors under PEFT's file names, float32, sharing memory with the model's; ConfigError when it isn't there.

        A linear layer [out, in] has lora_A.weight [r, in] and lora_B.weight [out, r], a DoRA lora_magnitude_vector [out] beside them.
        """
        self._require(name)
        return lora.adapter_tensors(self.peft, name)

    def save(self, name: str, folder: str | Path) -> None:
        """Write an adapter in PEFT's own format, loadable without marl.

        On a prepared base (an adapter merged in) no base is named: `source` alone would be the wrong one.
        """
        self._require(name)
        lora.write_adapter(self.peft, name, Path(folder), None if self.prepared else os.path.expanduser(self.source))

    # -- scores ---------------------------------------------------------------------------------------------

    def score(self, view: ScoreView | str, ids: Tensor, mask: Tensor, options: PassOptions | None = None) -> Tensor:
        """Scores of whole sequences: ids, mask [B, L], padded on either side -> [B] float32.

        `view`: what load_reward gave, or the reward adapter's name. Ids of any integer dtype, a mask of 0 and 1 of any
        dtype, on any device, as tensors, arrays or lists. DataError otherwise. `options` as in `using`.
        """
        tokens = as_ids(ids, "ids")
        counts = as_mask(mask, "mask", tuple(tokens.shape)).to(tokens.device)
        require_tokens(counts, "mask")
        require_room(counts, self.trunk.most_positions, "ids")
        tokens = without_garbage(tokens, counts, self.trunk.vocabulary, "ids")
        with nullcontext() if options is None else self.trunk.passing(options):
            return reward_adapter.score(
                self, reward_adapter.named(self, view), tokens.to(self.device), counts.to(self.device)
            )

    def compute_reward_score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        ppo_adapter_name: str | None = None,
        reward: ScoreView | str | None = None,
        **beside: object,
    ) -> Tensor:
        """The classic call: rewards [B] float32 of input_ids [B, L] from the reward adapter.

        Takes what a tokenizer returns, `**tokenizer(texts, padding=True)` included: see `score` for dtypes; what stands `beside` ids and
        mask there (token types, which causal models have not, lengths, offsets) changes no score. Without a mask every token counts.
        Afterwards the policy `ppo_adapter_name` is active (or, without a name, whatever was before). `reward` picks among several
        reward adapters. ConfigError for a name that isn't there, and for an argument that no tokenizer gives; DataError for ids or a mask
        that can't be meant, tokens outside the vocabulary, and rows without a token or longer than the model's positions.
        """
        unknown = sorted(set(beside) - OTHER_TOKENIZER_OUTPUTS)
        if unknown:
            raise ConfigError(
                f"compute_reward_score: it takes no {', '.join(unknown)}. Give input_ids, attention_mask, ppo_adapter_name and reward."
            )
        if ppo_adapter_name is not None and ppo_adapter_name not in self.adapters:
            have = ", ".join(self.adapters)
            raise ConfigError(f"ppo_adapter_name: this bank has no adapter {ppo_adapter_name!r}; it has: {have}.")
        view = reward_adapter.only(self) if reward is None else reward_adapter.named(self, reward)
        ids = as_ids(input_ids, "input_ids")
        mask = (
            torch.ones_like(ids)
            if attention_mask is None
            else as_mask(attention_mask, "attention_mask", tuple(ids.shape))
        )
        scores = self.score(view, ids, mask)
        if ppo_adapter_name is not None:
            self.activate(ppo_adapter_name)
        return scores
