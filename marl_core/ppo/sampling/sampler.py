"""Samplers: prompts in, a rollout out. `PolicySampler` samples from a bank's policy, by its own loop or by transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.speed.merged_copies import merged_copies
from marl_core.bank.trunk import PassOptions
from marl_core.config.run_config import SamplingSection, SpeedSection
from marl_core.config.speed_config import is_on
from marl_core.errors import warn
from marl_core.ppo.policy_output import PassOrigin, PolicyOutput
from marl_core.ppo.progress import part
from marl_core.ppo.sampling import by_transformers
from marl_core.ppo.sampling.decode import Decoded, decode, stacked
from marl_core.ppo.sampling.stop_strings import StopStrings
from marl_core.ppo.texts import response_texts
from marl_core.ppo.types import Prompts, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows of a batch that one rank samples: from `first` on, of `total`. Each draws the numbers it would in the whole batch."""

    first: int = 0
    total: int | None = None
    """None: the sampled rows are the whole batch."""


class Sampler(Protocol):
    """An engine that samples, whichever it is."""

    def __call__(
        self,
        prompts: Prompts,
        seed: int | None,
        *,
        samples: int = 1,
        limits: Tensor | None = None,
        shard: Shard = Shard(),  # frozen
    ) -> Rollout:
        """`samples` responses to each of n prompts, one below the other; from `seed` alone where one is given.

        limits [n * samples] int64: most tokens of each row, where fewer than the sampler's own. A `shard` of a batch gives the rows
        that the whole batch would give.
        """


@dataclass(frozen=True, slots=True)
class PolicySampler:
    """Samples through one adapter of a bank, or its bare base (None).

    The rollout also carries the log-probs (and the values of `value_head`) that were seen in sampling, where they are exact enough
    for the update. The global random state is left as it was when a seed is given.
    """

    bank: AdapterBank
    adapter: str | None
    sampling: SamplingSection
    stops: tuple[int, ...]
    """Tokens that end a response, as `stop_ids` gives them."""
    speed: SpeedSection = field(default_factory=SpeedSection)
    value_head: str | None = None
    options: PassOptions | None = None
    """How the passes go through the base; None: as the block around the call says."""
    witness: bool = False
    """Keep what sampling saw however coarsely it is rounded: to be compared with a scoring pass, not to stand for one."""

    @torch.no_grad()
    def __call__(
        self,
        prompts: Prompts,
        seed: int | None = None,
        *,
        samples: int = 1,
        limits: Tensor | None = None,
        shard: Shard = Shard(),  # frozen
    ) -> Rollout:
        """Sample `samples` responses to each prompt; see `Sampler`.

        `sampling.rows` rows are sampled at once. Each draws numbers of its own, so how many doesn't matter; only transformers'
        `generate` draws for all its rows together.
        """
        prompts = prompts.to(self.bank.device).with_texts(self.bank.tokenizer)
        _warn_of_appended_ends(self.bank.tokenizer, prompts)
        max_new_tokens = self.sampling.max_new_tokens
        longest = torch.full((len(prompts) * samples,), max_new_tokens)
        longest = longest if limits is None else limits.to(longest.device).clamp(1, max_new_tokens)
        if self.bank.trunk.sampler(self.speed.decode) == "transformers":
            return self._by_transformers(prompts.repeat(samples), seed, longest, samples, shard)
        return self._by_own_loop(prompts, seed, longest, samples, shard)

    def _by_own_loop(self, prompts: Prompts, seed: int | None, longest: Tensor, samples: int, shard: Shard) -> Rollout:
        random = None if seed is None else torch.Generator().manual_seed(seed)
        count = len(longest)
        uniforms = torch.rand(shard.total or count, self.sampling.max_new_tokens, generator=random, dtype=torch.float64)
        uniforms = uniforms[shard.first : shard.first + count, : int(longest.max()) if count else 0]
        pieces, decoded_pieces = self._pieces(count, samples), []
        with self._sampling_view() as bank:
            for index, rows in enumerate(pieces):
                with part(index, len(pieces)):
                    piece = decode(
                        bank,
                        prompts.select(slice(rows.start // samples, rows.stop // samples)),
                        self.sampling,
                        self.stops,
                        uniforms[rows].to(bank.device),
                        longest=longest[rows],
                        value_head=self.value_head,
                    )
                decoded_pieces.append(piece)
            decoded = Decoded.cat(decoded_pieces)
        rollout = self._rollout(prompts.repeat(samples), decoded.ids, decoded.mask, decoded.finished)
        return replace(rollout, behavior=self._behavior(rollout, decoded.output))

    @contextmanager
    def _sampling_view(self) -> Iterator[AdapterBank]:
        """A block in which the bank is set up for sampling: adapter, generation mode and, if asked for or worth it, merged copies."""
        bank = self.bank
        with bank.using(self.adapter, options=self.options), bank.trunk.generating():
            asked = self.speed.merge_for_sampling
            if not is_on(asked, bank.device.type):
                yield bank
                return
            with merged_copies(bank, self.adapter, dear_only=asked is None):
                yield bank

    def _behavior(self, rollout: Rollout, output: PolicyOutput) -> PolicyOutput | None:
        """The sampling pass's output with its origin, where it is exact enough to replace a scoring pass, or asked for; else None."""
        bank = self.bank
        exact = bank.quantization.config is None and bank.trunk.precision == "float32"
        wanted = self.witness or (is_on(self.speed.capture, bank.device.type) and exact)
        lengths = [*rollout.prompts.mask.sum(dim=1).tolist(), *rollout.sequence_mask.sum(dim=1).tolist()]
        if not (wanted and bank.trunk.stretched.alike(lengths)):
            return None
        origin = PassOrigin.of(bank, self.adapter, self.value_head, self.sampling.temperature)
        return replace(output, origin=origin, token_digests=rollout.digests())

    def _by_transformers(
        self, prompts: Prompts, seed: int | None, longest: Tensor, samples: int, shard: Shard
    ) -> Rollout:
        parts, pieces = [], self._pieces(len(longest), samples)
        for index, rows in enumerate(pieces):
            view = self.bank.using(self.adapter, options=self.options)
            with view, self.bank.trunk.generating(), part(index, len(pieces)):
                parts.append(
                    by_transformers.generate(
                        self.bank,
                        prompts.select(rows),
                        self.sampling,
                        self.stops,
                        None if seed is None else seed + shard.first + rows.start,
                        pad=self._pad,
                        longest=longest[rows],
                    )
                )
        ids, mask, finished = zip(*parts, strict=True)
        return self._rollout(prompts, stacked(ids), stacked(mask), torch.cat(finished))

    def _pieces(self, count: int, samples: int) -> list[slice]:
        """The rows sampled together; those of one prompt share its prefill."""
        size = max(self.sampling.at_once(count, samples), 1)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _rollout(self, prompts: Prompts, ids: Tensor, mask: Tensor, finished: Tensor) -> Rollout:
        tokenizer = self.bank.tokenizer
        texts = response_texts(tokenizer, prompts, [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)])
        strings = StopStrings.of(self.sampling.stop_strings, tokenizer)
        texts = texts if strings is None else [strings.cut(text) for text in texts]
        ids = ids.masked_fill(~mask, self._pad).contiguous()
        return Rollout(
            prompts, ids, mask.contiguous(), texts, finished, self.sampling.min_new_tokens, tuple(self.stops)
        )

    @property
    def _pad(self) -> int:
        pad = self.bank.tokenizer.pad_token_id
        return int(self.stops[0] if pad is None else pad)


def _warn_of_appended_ends(tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> None:
    """A MarlWarning when every prompt ends in an EOS that this tokenizer appends to each text."""
    eos = tokenizer.eos_token_id
    if eos is None or not bool((prompts.ids[:, -1] == eos).all()) or list(tokenizer("a").input_ids)[-1] != eos:
        return
    warn(
        "generate: every prompt ends in the EOS that this tokenizer appends to a text, so all responses are written after the end. "
        "Take it off (ids[:-1]); prompts that marl reads from `data` have none."
    )
