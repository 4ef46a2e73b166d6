"""AdapterBank: one frozen base, many named adapters of any kind, at most one active, each trainable or frozen for the whole run.

This is the only code that says which adapter stands in the base and which learns. Forward and backward of one adapter are
one indivisible block: with gradient checkpointing, backward recomputes through whatever adapter is active then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from marl_core.artifacts.adapter_files import AdapterFiles
from marl_core.artifacts.adapter_kinds import base_refusal, config_refusal, not_a_policy
from marl_core.bank import heads, peft_adapters
from marl_core.bank.base import load_base, load_for_bank
from marl_core.bank.guard import BaseGuard, Look, Mark, unusual
from marl_core.bank.identity import reward_adapter
from marl_core.bank.identity.fingerprint import Fingerprint, kinds
from marl_core.bank.identity.reward_check import check_base
from marl_core.bank.identity.which_base import Origin
from marl_core.bank.inputs import as_ids, as_mask, require_room, require_tokens, without_garbage
from marl_core.bank.mount import Mounted
from marl_core.bank.out_of_memory import raise_if_out_of_memory
from marl_core.bank.targets import Layers, linear_names, without_idle
from marl_core.bank.trunk import PassOptions, Trunk
from marl_core.bank.views import Position, ScoreView, View
from marl_core.bank.weight_versions import WeightVersions
from marl_core.errors import ConfigError, DataError
from marl_core.registry.deprecation import warn_deprecated
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
        self._mounted: dict[str, Mounted] = {}
        self._standing: str | None = None
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
        """A bank on the model at `path`; `options` are those of marl_core.bank.base.load_for_bank.

        DataError for a model that can't be loaded or used, ConfigError for a device that isn't here, and for options that don't go
        together.
        """
        loaded = load_for_bank(path, dtype=dtype, tokenizer=tokenizer, device=device, **options)
        bank = cls(loaded.model, loaded.tokenizer, source=loaded.source, quantization=loaded.quantization)
        bank.trunk.sharded = loaded.sharded
        bank.note_read(loaded.origin, loaded.fingerprint)
        return bank

    @property
    def base(self) -> PreTrainedModel:
        """The causal language model; the active adapter's layers stand in it, no other's."""
        return self.trunk.model

    @property
    def peft(self) -> Any:
        """Deprecated: use `config`. Its `peft_config` holds PEFT's config of each adapter by name."""
        warn_deprecated("bank.peft", "bank.config(name), PEFT's config of one adapter", "0.1")
        return SimpleNamespace(peft_config={name: mounted.config for name, mounted in self._mounted.items()})

    @property
    def device(self) -> torch.device:
        """Where the base lives."""
        return self.trunk.device

    def note_read(self, origin: Origin | None, prints: Fingerprint | None) -> None:
        """Where the base comes from and what it is, from now on as long as nobody writes to it."""
        self.origin, self.fingerprint, self._read_as = origin, prints, self._guard.marks()

    @property
    def as_read(self) -> bool:
        """Whether origin and fingerprint still hold: the base was read by from_pretrained, and nobody wrote to it since."""
        return self._read_as is not None and self._read_as == self._guard.marks()

    @property
    def active(self) -> str | None:
        """The active adapter; None when the bare base is seen."""
        return self._active

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters, in the order they came."""
        return list(self._mounted)

    @property
    def linears(self) -> Layers:
        """Full names of the linear layers that an adapter can change with effect, the LM head left out. Measured once."""
        if not self._measured:
            with self.bare():
                self._layers = without_idle(self._layers, self.base, self.trunk.try_all)
            self._measured = True
        return self._layers

    # -- adding ---------------------------------------------------------------------------------------------

    def add(self, name: str, config: PeftConfig, *, trainable: bool = True, seed: int | None = None) -> None:
        """A new adapter of any kind that PEFT has for layers; its initial weights depend on `seed` alone.

        The config stays the caller's; the global random state stays as it was. ConfigError for a kind that a base with several
        roles can't hold, and when making or training it would change the base, which is then as it was.
        """
        if not isinstance(config, PeftConfig):
            raise ConfigError(
                f"adapter {name!r}: give a config of peft's, e.g. peft.LoraConfig, not a {type(config).__name__}."
            )
        wrong = list(config_refusal(config.peft_type, vars(config), f"adapter {name!r}", fresh=False))
        wrong += self._unfit(name, config, trainable)
        if wrong:
            raise ConfigError("\n".join(wrong))
        changed = self._insert(name, deepcopy(config), trainable, seed, lambda: None)
        if changed:
            raise ConfigError(f"adapter {name!r}: {changed}")

    def _unfit(self, name: str, config: PeftConfig, learns: bool) -> Iterator[str]:
        """Why an adapter of this kind can't stand on a base of this quantization and dtype."""
        yield from base_refusal(
            config.peft_type,
            vars(config),
            f"adapter {name!r}",
            quantization=peft_adapters.quantization_name(self.quantization),
            dtype=str(self.base.dtype).removeprefix("torch."),
            learns=learns,
        )

    def copy(self, source: str, name: str) -> None:
        """A frozen adapter `name` of the same kind as `source` with the same tensors, e.g. a reference that follows the policy.

        ConfigError when the bank has no adapter `source`, and for a name that is taken.
        """
        tensors = {key: tensor.clone() for key, tensor in self.tensors(source).items()}
        config = self.config(source)
        changed = self._insert(name, config, False, 0, lambda: self.fill(name, tensors))
        if changed:
            raise ConfigError(f"adapter {name!r}: {changed}")

    def _insert(
        self, name: str, config: PeftConfig, trainable: bool, seed: int | None, fill: Callable[[], None]
    ) -> str:
        """Make an adapter and fill its weights. What is wrong when that changed the base; then it isn't in the bank."""
        self._refuse_when_spoiled()
        peft_adapters.check_name(name, {*self.adapters, *self.heads})
        self._stand(None)
        before = self._guard.look()
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                if seed is not None:
                    torch.manual_seed(seed)
                mounted = peft_adapters.make(self.base, name, config, self._layers)
            self._mounted[name] = mounted
            if trainable:
                self._trainable.add(name)
            self._restore()
            self.trunk.adapter_added(mounted.layers.values())
            self._refuse_unsound(name)
            self._try(name)
            fill()
        except Exception:
            self._undo(name, before)
            raise
        self._stand(None)
        changed = self._guard.changed(before)
        if not changed:
            self._stand(self._active)
            return ""
        self._undo(name, before)
        after = "it can't be put back, so this bank can't be used any more" if self._spoiled else "it has been put back"
        return (
            f"peft rewrote the base's weights ({kinds(changed)}), which all roles share; {after}, and the adapter isn't "
            f"added. Of its options: {unusual(config)}. Use another kind of adapter, or none that starts from the base's own weights."
        )

    def _refuse_unsound(self, name: str) -> None:
        """ConfigError for an adapter that a pass wouldn't reach, or that its own file wouldn't hold."""
        mounted = self._mounted[name]
        peft_adapters.refuse_output_layer(self.base, name, mounted)
        with self.using(name):
            peft_adapters.refuse_unreadable(name, mounted, self._layers)
            lost = mounted.learning_not_saved(name) if name in self._trainable else []
        if lost:
            raise ConfigError(
                f"adapter {name!r}: {len(lost)} tensors learn that its file wouldn't hold (first: {lost[0]}): a resumed run would differ. "
                "Use another kind of adapter."
            )

    def _try(self, name: str) -> None:
        """One small pass through a new adapter: a layer of the model that can't run with it is named at once."""
        try:
            with self.using(name):
                self.trunk.try_out()
        except Exception as error:
            raise_if_out_of_memory(error)
            raise ConfigError(
                peft_adapters.odd_layer(self.base, name, self._mounted[name], self._layers, error)
            ) from error

    def _undo(self, name: str, before: Look) -> None:
        """Take out an adapter, and give the base back what it held."""
        if name in self.adapters:
            self.remove(name)
        self._trainable.discard(name)
        self._stand(None)
        if not (self._guard.put_back(before) or self._read_again(before)):
            self._spoiled = f"making the adapter {name!r} changed the base's weights, and what they were is lost"
        self._restore()

    def _read_again(self, before: Look) -> bool:
        """Take what was written over from the files; whether the base is as it was."""
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
        """Load an adapter from PEFT's files; frozen unless `trainable`. DataError unless every tensor finds its place.

        `dropout` replaces the one that the adapter was trained with. `revision` is that of a hub name (branch,
        tag or commit), `subfolder` the folder inside `path` that holds the adapter, as peft calls them.
        """
        files = peft_adapters.find_adapter(path, asked_by, revision, subfolder)
        peft_adapters.check_name(name, {*self.adapters, *self.heads})
        config: Any = peft_adapters.config_of(
            files, self.linears, asked_by, getattr(self.base.config, "model_type", None)
        )
        wrong = not_a_policy(files) if trainable else None
        if wrong is not None:
            raise DataError(f"{asked_by}: {wrong}")
        if trainable:
            config.task_type = "CAUSAL_LM"
        if dropout is not None:
            peft_adapters.set_dropout(config, dropout, asked_by)
        unfit = list(self._unfit(name, config, trainable))
        if unfit:
            raise ConfigError("\n".join(f"{asked_by}: {files.folder}: {sentence}" for sentence in unfit))

        try:
            changed = self._insert(name, config, trainable, 0, lambda: self._read_weights(name, files, asked_by))
        except ConfigError as error:  # a file's layers are the file's, not the user's
            raise peft_adapters.cannot_stand(files, error, asked_by) from error
        if changed:
            raise DataError(f"{asked_by}: {files.folder}: {changed}")
        if not files.score_keys:  # a reward adapter has a check of its own
            try:
                self.base_checks[name] = check_base(self, files, asked_by)
            except DataError:
                self.remove(name)
                raise
        self._paths[name] = files.folder.resolve()

    def _read_weights(self, name: str, files: AdapterFiles, asked_by: str) -> None:
        with self.using(name):
            peft_adapters.load_weights(self._mounted[name], files, asked_by)

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
        folder = peft_adapters.find_adapter(path, asked_by, revision, subfolder).folder.resolve()
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
        peft_adapters.check_name(name, {*self.adapters, *self.heads})
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
            self._active = None
        self._stand(None)
        self.trunk.adapter_removed(self._mounted.pop(name).layers.values())
        self._trainable.discard(name)
        for known in (self._paths, self.reward_views, self.reward_checks, self.base_checks):
            known.pop(name, None)
        for head in (heads.score_head_of(name), heads.value_head_of(name)):
            self.heads.pop(head, None)
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
        self._stand(adapter)

    def _stand(self, adapter: str | None) -> None:
        """Let this adapter's layers stand in the base, None: no adapter's."""
        if self._standing in self._mounted:
            self._mounted[self._standing].take_off()
        if adapter is not None:
            self._mounted[adapter].put_on()
        self._standing = adapter

    def see_again(self, adapter: str | None) -> None:
        """Let `adapter` be the active one, whatever somebody did behind the bank to the tree or to PEFT's layers."""
        for mounted in self._mounted.values():
            mounted.switch_on()
            mounted.take_off()
        self._active = adapter
        self._restore()

    @property
    def seen(self) -> tuple[object, ...]:
        """What the tree shows of each adapter, whoever changed it: whether its layers stand, and what PEFT's calls switch in them."""
        return tuple((name, sorted(mounted.stands), mounted.settings) for name, mounted in self._mounted.items())

    @contextmanager
    def using(
        self, adapter: str | None, *, train: bool = False, options: PassOptions | None = None
    ) -> Iterator[PreTrainedModel]:
        """See the base through `adapter`, with its dropout on only if `train`. Afterwards all is as it was.

        `options`: how the passes inside go through the base; None: as those around the block do.
        """
        before = self._active
        self.activate(adapter)
        mounted = self._mounted.get(adapter) if adapter is not None else None
        dropped = mounted.train(train) if mounted else False
        try:
            with nullcontext() if options is None else self.trunk.passing(options):
                yield self.base
        finally:
            if mounted:
                mounted.train(dropped)
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
        """The parameters of an adapter or head that learn, by name, float32: what an optimizer gets.

        Of an adapter those that PEFT leaves learning when it makes one, of a frozen one too. ConfigError when the bank has neither.
        """
        if name in self.heads:
            return {f"{name}.{key}": value for key, value in self.heads[name].named_parameters()}
        if name not in self._mounted:
            raise ConfigError(
                f"This bank has no adapter or head {name!r}; it has: {', '.join([*self.adapters, *self.heads])}."
            )
        return self._mounted[name].learning(name)

    def all_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter of the base and of all adapters, whichever stands in the tree."""
        found = self.base_parameters()
        for name in self._mounted:
            found |= self.adapter_parameters(name)
        return found

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The base's own parameters by name."""
        with self.bare():
            return dict(self.base.named_parameters())

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Every parameter of an adapter, those that its kind never trains among them."""
        self._require(name)
        return self._mounted[name].parameters(name)

    def all_modules(self) -> list[nn.Module]:
        """Every module of the base and of all adapters, whichever stands in the tree."""
        with self.bare():
            return [*self.base.modules(), *(module for mounted in self._mounted.values() for module in mounted.modules)]

    def wrappers(self, name: str) -> dict[str, nn.Module]:
        """PEFT's layers of an adapter by the names of the model's layers that they stand for."""
        self._require(name)
        return self._mounted[name].layers

    def config(self, name: str) -> Any:
        """A copy of PEFT's config of an adapter. ConfigError when the bank hasn't got it."""
        self._require(name)
        return self._mounted[name].fresh_config()

    def checksum(self, *names: str) -> int:
        """A number of the bits of these adapters and heads: any change of their weights or scaling, however made, shows in it."""
        held = {
            name: self.adapter_parameters(name) if name in self._mounted else self.parameters(name) for name in names
        }
        weights = WeightVersions(pair for parameters in held.values() for pair in parameters.items())
        numbers = (self._mounted[name].numbers() for name in names if name in self._mounted)
        return hash((weights.checksum(), *numbers))

    def _require(self, adapter: str) -> None:
        if adapter not in self.adapters:
            raise ConfigError(f"This bank has no adapter {adapter!r}; it has: {', '.join(self.adapters) or 'none'}.")

    def _restore(self) -> None:
        """Undo what a PEFT call did to the active adapter and to the trainable set."""
        self._stand(None)
        self.base.requires_grad_(False)
        for name, mounted in self._mounted.items():
            for parameter in mounted.parameters(name).values():
                parameter.requires_grad_(False)
            for parameter in mounted.learning(name).values():
                parameter.requires_grad_(name in self._trainable)
        self._stand(self._active if self._active in self._mounted else None)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """An adapter's tensors under PEFT's file names; those that are the model's share its memory. ConfigError when it isn't there.

        Of a LoRA a linear layer [out, in] has lora_A.weight [r, in] and lora_B.weight [out, r], float32.
        """
        with self.using(name):
            return self._mounted[name].file_tensors()

    def fill(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors under PEFT's file names into an adapter, bit for bit. DataError when they are others than `tensors` gives."""
        mine = self.tensors(name)
        if set(mine) != set(tensors):
            raise DataError(
                f"adapter {name!r}: its tensors have other names, first: {sorted(set(mine) ^ set(tensors))[:2]}."
            )
        for key, tensor in mine.items():
            if tensor.shape != tensors[key].shape:
                raise DataError(f"adapter {name!r}: {key} is {list(tensors[key].shape)}, here {list(tensor.shape)}.")
        with self.using(name):
            try:
                self._mounted[name].fill(tensors)
            except ValueError as error:
                raise DataError(f"adapter {name!r}: {error}.") from error

    def save(self, name: str, folder: str | Path) -> None:
        """Write an adapter in PEFT's own format, loadable without marl.

        On a prepared base (an adapter merged in) no base is named: `source` alone would be the wrong one.
        """
        with self.using(name):
            peft_adapters.write_adapter(
                self._mounted[name], Path(folder), None if self.prepared else os.path.expanduser(self.source)
            )

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
