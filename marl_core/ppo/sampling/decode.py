"""Sampling token by token with a cache: finished rows leave the batch, samples of one prompt share its prefill.

What is drawn and what is scored are one distribution. Log-probs, entropies and values are by-products of the pass that
draws; in float32 they are exact enough to stand for a scoring pass (see policy_output.py).
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
from marl_core.ppo.policy_output import PolicyOutput
from marl_core.ppo.sampling.choose import choose, scored_logits
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
    longest: Tensor,
    value_head: str | None = None,
) -> Decoded:
    """Sample through the active adapter, as many responses to each of the n prompts as there are uniform numbers for.

    uniforms [B, T] float64, B a multiple of n: those of one prompt one below the other; longest [B] int64: most tokens of each row.
    """
    (count, most), device = uniforms.shape, bank.device
    samples = count // len(prompts)
    decoded = Decoded.empty(count, most, device, value_head is not None)
    stop, longest = torch.tensor(list(stops), device=device), longest.to(device)
    strings = StopStrings.of(sampling.stop_strings, bank.tokenizer)
    decoders = ResponseDecoder.of(bank.tokenizer, prompts) if strings is not None else []
    live, hidden = _prefill(bank, prompts, samples, most)
    for place in range(most):
        never = stops if place < sampling.min_new_tokens else ()
        tokens, output = _draw(bank, hidden, uniforms[live.rows, place], sampling, never)
        if value_head is not None:
            output = PolicyOutput(output.logprobs, output.entropy, apply_head(bank.heads[value_head], hidden))
        decoded.write(live, place, tokens, output)
        stopped = torch.isin(tokens, stop)
        if strings is not None:
            written = decoded.ids[live.rows, : place + 1]
            stopped |= strings.met(written, [decoders[row // samples] for row in live.rows.tolist()])
        decoded.finished[live.rows] |= stopped & live.going
        live.going &= ~stopped & (place + 1 < longest[live.rows])
        if place + 1 == most or not bool(live.going.any()):
            break
        hidden = live.advance(bank, tokens)
    return decoded.trimmed()


def _draw(
    bank: AdapterBank, hidden: Tensor, uniform: Tensor, sampling: SamplingSection, never: Sequence[int]
) -> tuple[Tensor, PolicyOutput]:
    """The next token of each row; the logits of a few rows are held at a time."""
    tokens, outputs = zip(
        *(
            choose(scored_logits(bank.trunk.logits_of(states), sampling.temperature, never), numbers, sampling)
            for states, numbers in zip(hidden.split(ROWS_AT_ONCE), uniform.split(ROWS_AT_ONCE), strict=True)
        ),
        strict=True,
    )
    return (tokens[0] if len(tokens) == 1 else torch.cat(tokens)), PolicyOutput.cat(outputs)


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
    """Each prompt once; then every sample has its row."""
    ids, seen = prompts.ids, prompts.mask
    cache = bank.trunk.new_cache(seen.shape[1] + most)
    hidden = bank.trunk.extend(ids, seen, cache)[:, -1]
    if samples > 1:
        cache.batch_repeat_interleave(samples)
        hidden, seen = hidden.repeat_interleave(samples, dim=0), seen.repeat_interleave(samples, dim=0)
    rows = torch.arange(len(seen), device=ids.device)
    return _Live(rows, torch.ones_like(rows, dtype=torch.bool), seen, cache), hidden


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Tensors [b, t] one below the other, [B, T]; narrower ones are filled with 0 on the right."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


@dataclass(frozen=True, slots=True)
class Decoded:
    """Response tokens [B, T] int64, their mask, which rows [B] met a stop, and what the sampling pass said of each token."""

    ids: Tensor
    mask: Tensor
    finished: Tensor
    output: PolicyOutput

    @classmethod
    def empty(cls, count: int, most: int, device: torch.device, values: bool) -> Decoded:
        """Room for `most` tokens a row."""
        ids = torch.zeros(count, most, dtype=torch.int64, device=device)
        numbers = torch.zeros(count, most, dtype=torch.float32, device=device)
        finished = torch.zeros(count, dtype=torch.bool, device=device)
        output = PolicyOutput(numbers, numbers.clone(), numbers.clone() if values else None)
        return cls(ids, ids.bool(), finished, output)

    def write(self, live: _Live, place: int, tokens: Tensor, output: PolicyOutput) -> None:
        """Write down one place of the rows that go on; zero elsewhere."""
        self.mask[live.rows, place] = live.going
        self.ids[live.rows, place] = tokens * live.going
        self.output.logprobs[live.rows, place] = output.logprobs * live.going
        self.output.entropy[live.rows, place] = output.entropy * live.going
        if self.output.values is not None and output.values is not None:
            self.output.values[live.rows, place] = output.values * live.going

    @classmethod
    def cat(cls, parts: Sequence[Decoded]) -> Decoded:
        """The rows of several, one below the other, as wide as the widest."""
        if len(parts) == 1:
            return parts[0]
        ids, mask = (stacked([getattr(part, name) for part in parts]) for name in ("ids", "mask"))
        width = ids.shape[1]

        def widened(tensor: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))

        output = PolicyOutput.cat([part.output.each(widened) for part in parts])
        return cls(ids, mask, torch.cat([part.finished for part in parts]), output)

    def trimmed(self) -> Decoded:
        """Without the places that no row reached."""
        width = int(self.mask.any(dim=0).sum())
        output = self.output.each(lambda tensor: tensor[:, :width])
        return Decoded(self.ids[:, :width], self.mask[:, :width], self.finished, output)
