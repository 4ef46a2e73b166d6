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
from marl_core.ppo.progress import advance
from marl_core.ppo.sampling.choose import choose, scored_logits
from marl_core.ppo.sampling.stop_strings import StopStrings
from marl_core.ppo.texts import ResponseDecoder
from marl_core.ppo.types import Prompts

ROWS_AT_ONCE = 64
"""Rows whose logits over the whole vocabulary are held together."""
ROWS_PER_FINISHED_ROW = 16
"""Finished rows leave the batch once at least one in this many has finished: moving the cache costs time, computing them too."""


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
    """Sample B / n responses to each of n prompts through the active adapter.

    uniforms [B, T] float64 in [0, 1): a row for each response, those to one prompt one below the other; longest [B] int64: most
    tokens of each response.
    """
    (count, max_new_tokens), device = uniforms.shape, bank.device
    samples = count // len(prompts)
    decoded = Decoded.empty(count, max_new_tokens, device, value_head is not None)
    stop, longest = torch.tensor(list(stops), device=device), longest.to(device)
    strings = StopStrings.of(sampling.stop_strings, bank.tokenizer)
    decoders = ResponseDecoder.of(bank.tokenizer, prompts) if strings is not None else []
    live, hidden = _prefill(bank, prompts, samples, max_new_tokens)
    for position in range(max_new_tokens):
        advance(position, max_new_tokens)
        banned = stops if position < sampling.min_new_tokens else ()
        tokens, output = _draw(bank, hidden, uniforms[live.rows, position], sampling, banned)
        if value_head is not None:
            output = PolicyOutput(output.logprobs, output.entropy, apply_head(bank.heads[value_head], hidden))
        decoded.write(live, position, tokens, output)
        stopped = torch.isin(tokens, stop)
        if strings is not None:
            written = decoded.ids[live.rows, : position + 1]
            stopped |= strings.met(written, [decoders[row // samples] for row in live.rows.tolist()])
        decoded.finished[live.rows] |= stopped & live.active
        live.active &= ~stopped & (position + 1 < longest[live.rows])
        if position + 1 == max_new_tokens or not bool(live.active.any()):
            break
        hidden = live.advance(bank, tokens)
    advance(max_new_tokens, max_new_tokens)
    return decoded.trimmed()


def _draw(
    bank: AdapterBank, hidden: Tensor, uniform: Tensor, sampling: SamplingSection, banned: Sequence[int]
) -> tuple[Tensor, PolicyOutput]:
    """The next token of each row; the logits of a few rows are held at a time."""
    tokens, outputs = zip(
        *(
            choose(scored_logits(bank.trunk.logits_of(states), sampling.temperature, banned), numbers, sampling)
            for states, numbers in zip(hidden.split(ROWS_AT_ONCE), uniform.split(ROWS_AT_ONCE), strict=True)
        ),
        strict=True,
    )
    return (tokens[0] if len(tokens) == 1 else torch.cat(tokens)), PolicyOutput.cat(outputs)


@dataclass(slots=True)
class _Live:
    """The rows still computed: their indices in the batch, which of them are unfinished, their attention mask, their KV cache."""

    rows: Tensor
    active: Tensor
    mask: Tensor
    cache: DynamicCache

    def advance(self, bank: AdapterBank, tokens: Tensor) -> Tensor:
        """Feed the chosen tokens; the hidden states [rows, H] that predict the next ones."""
        finished = len(self.rows) - int(self.active.sum())
        if finished * ROWS_PER_FINISHED_ROW >= len(self.rows):
            kept = self.active.nonzero().squeeze(1)
            self.cache.batch_select_indices(kept)
            self.rows, self.active, self.mask, tokens = (
                self.rows[kept],
                self.active[kept],
                self.mask[kept],
                tokens[kept],
            )
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        return bank.trunk.extend(tokens[:, None], self.mask, self.cache)[:, -1]


def _prefill(bank: AdapterBank, prompts: Prompts, samples: int, max_new_tokens: int) -> tuple[_Live, Tensor]:
    """Prefill each prompt once, then repeat its cache for every sample."""
    ids, mask = prompts.ids, prompts.mask
    cache = bank.trunk.new_cache(mask.shape[1] + max_new_tokens)
    hidden = bank.trunk.extend(ids, mask, cache)[:, -1]
    if samples > 1:
        cache.batch_repeat_interleave(samples)
        hidden, mask = hidden.repeat_interleave(samples, dim=0), mask.repeat_interleave(samples, dim=0)
    rows = torch.arange(len(mask), device=ids.device)
    return _Live(rows, torch.ones_like(rows, dtype=torch.bool), mask, cache), hidden


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
    def empty(cls, count: int, max_new_tokens: int, device: torch.device, values: bool) -> Decoded:
        """Zeros for `count` rows of `max_new_tokens` tokens."""
        ids = torch.zeros(count, max_new_tokens, dtype=torch.int64, device=device)
        numbers = torch.zeros(count, max_new_tokens, dtype=torch.float32, device=device)
        finished = torch.zeros(count, dtype=torch.bool, device=device)
        output = PolicyOutput(numbers, numbers.clone(), numbers.clone() if values else None)
        return cls(ids, ids.bool(), finished, output)

    def write(self, live: _Live, position: int, tokens: Tensor, output: PolicyOutput) -> None:
        """Write one position of the live rows; zero for those that have finished."""
        self.mask[live.rows, position] = live.active
        self.ids[live.rows, position] = tokens * live.active
        self.output.logprobs[live.rows, position] = output.logprobs * live.active
        self.output.entropy[live.rows, position] = output.entropy * live.active
        if self.output.values is not None and output.values is not None:
            self.output.values[live.rows, position] = output.values * live.active

    @classmethod
    def cat(cls, parts: Sequence[Decoded]) -> Decoded:
        """Rows of several, one below the other, padded to the widest."""
        if len(parts) == 1:
            return parts[0]
        ids, mask = (stacked([getattr(part, name) for part in parts]) for name in ("ids", "mask"))
        width = ids.shape[1]

        def widened(tensor: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))

        output = PolicyOutput.cat([part.output.each(widened) for part in parts])
        return cls(ids, mask, torch.cat([part.finished for part in parts]), output)

    def trimmed(self) -> Decoded:
        """Without the positions that no row reached."""
        width = int(self.mask.any(dim=0).sum())
        output = self.output.each(lambda tensor: tensor[:, :width])
        return Decoded(self.ids[:, :width], self.mask[:, :width], self.finished, output)
