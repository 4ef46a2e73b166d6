"""Sampling token by token with a cache: finished rows leave the batch, samples of one prompt share its prefill.

What is drawn and what is scored are one distribution. Log-probs, entropies and values are by-products of the pass that
draws; in float32 they are exact enough to stand for a scoring pass (see captured.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.heads import apply_head
from marl_core.config.run_config import SamplingSection
from marl_core.ppo.sampling.choose import Chosen, choose, scored_logits
from marl_core.ppo.sampling.stop_strings import StopStrings
from marl_core.ppo.texts import ResponseDecoder
from marl_core.ppo.types import Prompts

ROWS_AT_ONCE = 64
"""Rows whose logits over the whole vocabulary are held together."""
LEAVING = 16
"""Finished rows leave once they are more than one in this many: moving the cache costs, computing them in vain too."""


def decode(
    bank: AdapterBank,
    prompts: Prompts,
    sampling: SamplingSection,
    stops: Sequence[int],
    uniforms: Tensor,
    *,
    limits: Tensor | None = None,
    samples: int = 1,
    value_head: str | None = None,
) -> Decoded:
    """Sample through the active adapter; prompts come `samples` times in a row each.

    uniforms [B, T] float64; limits [B]: most tokens of each row.
    """
    (count, most), device = uniforms.shape, bank.device
    found = Decoded.empty(count, most, device, value_head is not None)
    longest = torch.full((count,), most) if limits is None else limits
    stop, longest = torch.tensor(list(stops), device=device), longest.to(device)
    strings = StopStrings.of(sampling.stop_strings, bank.tokenizer)
    decoders = ResponseDecoder.of(bank.tokenizer, prompts) if strings is not None else []
    live, hidden = _prefill(bank, prompts, samples, most)
    for place in range(most):
        never = stops if place < sampling.min_new_tokens else ()
        chosen = _draw(bank, hidden, uniforms[live.rows, place], sampling, never)
        values = apply_head(bank.heads[value_head], hidden) if value_head is not None else None
        found.keep(live, place, chosen, values)
        stopped = torch.isin(chosen.tokens, stop)
        if strings is not None:
            stopped |= strings.met(found.ids[live.rows, : place + 1], [decoders[row] for row in live.rows.tolist()])
        found.finished[live.rows] |= stopped & live.going
        live.going &= ~stopped & (place + 1 < longest[live.rows])
        if place + 1 == most or not bool(live.going.any()):
            break
        hidden = live.advance(bank, chosen.tokens)
    return found.trimmed()


def _draw(
    bank: AdapterBank, hidden: Tensor, uniform: Tensor, sampling: SamplingSection, never: Sequence[int]
) -> Chosen:
    """The next token of each row; the logits of a few rows are held at a time."""
    parts = [
        choose(scored_logits(bank.trunk.logits_of(states), sampling.temperature, never), numbers, sampling)
        for states, numbers in zip(hidden.split(ROWS_AT_ONCE), uniform.split(ROWS_AT_ONCE), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    tokens, logprobs, entropy = zip(*((part.tokens, part.logprobs, part.entropy) for part in parts), strict=True)
    return Chosen(torch.cat(tokens), torch.cat(logprobs), torch.cat(entropy))


@dataclass(slots=True)
class _Live:
    """The rows still computed: their numbers in the batch, which of them go on, what they have seen, their cache."""

    rows: Tensor
    going: Tensor
    seen: Tensor
    cache: DynamicCache

    def advance(self, bank: AdapterBank, tokens: Tensor) -> Tensor:
        """Feed the chosen tokens; the hidden states [rows, H] that predict the next ones."""
        gone = len(self.rows) - int(self.going.sum())
        if gone * LEAVING >= len(self.rows):
            stay = self.going.nonzero().squeeze(1)
            self.cache.batch_select_indices(stay)
            self.rows, self.going, self.seen, tokens = self.rows[stay], self.going[stay], self.seen[stay], tokens[stay]
        self.seen = torch.cat([self.seen, torch.ones_like(self.seen[:, :1])], dim=1)
        return bank.trunk.extend(tokens[:, None], self.seen, self.cache)[:, -1]


def _prefill(bank: AdapterBank, prompts: Prompts, samples: int, most: int) -> tuple[_Live, Tensor]:
    """Each different prompt once; then every sample has its row."""
    ids, mask = prompts.ids[::samples], prompts.mask[::samples]
    cache = bank.trunk.new_cache(mask.shape[1] + most)
    hidden = bank.trunk.extend(ids, mask, cache)[:, -1]
    if samples > 1:
        cache.batch_repeat_interleave(samples)
        hidden = hidden.repeat_interleave(samples, dim=0)
    rows = torch.arange(len(prompts), device=ids.device)
    return _Live(rows, torch.ones_like(rows, dtype=torch.bool), prompts.mask, cache), hidden


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Tensors [b, t] one below the other, [B, T]; narrower ones are filled with 0 on the right."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


@dataclass(slots=True)
class Decoded:
    """Response tokens [B, T] int64, their mask, which rows met a stop token, and the numbers seen on the way."""

    ids: Tensor
    mask: Tensor
    finished: Tensor
    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None

    @classmethod
    def empty(cls, count: int, most: int, device: torch.device, values: bool) -> Decoded:
        """Room for `most` tokens a row."""
        ids = torch.zeros(count, most, dtype=torch.int64, device=device)
        numbers = torch.zeros(count, most, dtype=torch.float32, device=device)
        finished = torch.zeros(count, dtype=torch.bool, device=device)
        return cls(ids, ids.bool(), finished, numbers, numbers.clone(), numbers.clone() if values else None)

    def keep(self, live: _Live, place: int, chosen: Chosen, values: Tensor | None) -> None:
        """Write down one place of the rows that go on; zero elsewhere."""
        self.mask[live.rows, place] = live.going
        self.ids[live.rows, place] = chosen.tokens * live.going
        self.logprobs[live.rows, place] = chosen.logprobs * live.going
        self.entropy[live.rows, place] = chosen.entropy * live.going
        if self.values is not None and values is not None:
            self.values[live.rows, place] = values * live.going

    @classmethod
    def joined(cls, parts: Sequence[Decoded]) -> Decoded:
        """The rows of several, one below the other."""
        if len(parts) == 1:
            return parts[0]
        ids, mask, logprobs, entropy = (
            stacked([getattr(part, name) for part in parts]) for name in ("ids", "mask", "logprobs", "entropy")
        )
        values = [part.values for part in parts if part.values is not None]
        finished = torch.cat([part.finished for part in parts])
        return cls(ids, mask, finished, logprobs, entropy, stacked(values) if values else None)

    def trimmed(self) -> Decoded:
        """Without the places that no row reached."""
        width = int(self.mask.any(dim=0).sum())
        values = None if self.values is None else self.values[:, :width]
        ids, mask, logprobs, entropy = (
            tensor[:, :width] for tensor in (self.ids, self.mask, self.logprobs, self.entropy)
        )
        return Decoded(ids, mask, self.finished, logprobs, entropy, values)
