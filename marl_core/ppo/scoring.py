"""What policy, value and reference say of a rollout, each from passes through its view of the shared base."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.heads import apply_head
from marl_core.bank.inputs import require_room, without_garbage
from marl_core.bank.views import View
from marl_core.errors import PluginError
from marl_core.ppo.budget import PassLimits
from marl_core.ppo.logprobs import Banned, chosen_logprobs, logits_logprobs
from marl_core.ppo.plugin_calls import call, describe
from marl_core.ppo.policy_output import PolicyOutput
from marl_core.ppo.progress import advance
from marl_core.ppo.roles import ReferenceFunction
from marl_core.ppo.types import Rollout


def require_fit(bank: AdapterBank, rollout: Rollout) -> None:
    """DataError when a rollout holds tokens that the base doesn't have, or more positions than it can read."""
    without_garbage(rollout.sequence_ids, rollout.sequence_mask, bank.trunk.vocabulary, "rollout")
    require_room(rollout.sequence_mask, bank.trunk.most_positions, "rollout")


def response_hidden(bank: AdapterBank, rollout: Rollout) -> Tensor:
    """Hidden states that predict the response tokens: positions P-1 .. P+T-2, [B, T, H]."""
    hidden = bank.trunk.hidden(rollout.sequence_ids, rollout.sequence_mask)
    start = rollout.prompts.ids.shape[1] - 1
    return hidden[:, start : start + rollout.ids.shape[1]]


def forward(
    bank: AdapterBank, rollout: Rollout, temperature: float, *, value_head: str | None = None, entropy: bool = False
) -> PolicyOutput:
    """Log-probs [B, T] float32 of the response through the active view, with values when a head is named; the graph is kept."""
    mask = rollout.mask
    targets, banned = rollout.ids[mask], _banned(rollout)
    plain = bank.trunk.plain_head
    hidden = response_hidden(bank, rollout) if plain or value_head else None
    if plain and hidden is not None:
        weight, bias = bank.trunk.head.weight, getattr(bank.trunk.head, "bias", None)
        logprobs, entropies = chosen_logprobs(hidden[mask], weight, bias, targets, temperature, entropy, banned)  # type: ignore[arg-type]  # torch types weight loosely
    else:
        width = rollout.ids.shape[1] + 1
        logits = bank.trunk.logits(rollout.sequence_ids, rollout.sequence_mask, width)[:, :-1]
        logprobs, entropies = logits_logprobs(logits[mask], targets, temperature, entropy, banned)
    values = (
        apply_head(bank.heads[value_head], hidden).masked_fill(~mask, 0.0)
        if value_head and hidden is not None
        else None
    )
    empty = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return PolicyOutput(empty.masked_scatter(mask, logprobs), empty.masked_scatter(mask, entropies), values)


def _banned(rollout: Rollout) -> Banned | None:
    """The stop tokens at the first positions, where `sampling.min_new_tokens` kept them from being sampled."""
    if not rollout.min_tokens or not rollout.stops:
        return None
    early = torch.arange(rollout.ids.shape[1], device=rollout.ids.device) < rollout.min_tokens
    return early.expand_as(rollout.mask)[rollout.mask], torch.tensor(rollout.stops, device=rollout.ids.device)


def blocks(lengths: Sequence[int], size: int, tokens: int | None = None) -> Iterator[slice]:
    """Rows in order, at most `size` a block, and at most `tokens` tokens if given; a row longer than that is a block of its own.

    Each `size` rows are cut into as few blocks as possible, of sizes as even as possible: the largest block decides the memory.
    """
    for start in range(0, len(lengths), size):
        rows = lengths[start : start + size]
        ends = _ends(rows, _even(rows, tokens)) if tokens is not None else [len(rows)]
        for first, end in pairwise([0, *ends]):
            yield slice(start + first, start + end)


def _even(lengths: Sequence[int], tokens: int) -> int:
    """The smallest budget that needs no more blocks than `tokens` does."""
    block_count = len(_ends(lengths, tokens))
    return bisect_left(range(tokens), True, key=lambda budget: len(_ends(lengths, budget)) <= block_count)


def _ends(lengths: Sequence[int], tokens: int) -> list[int]:
    """Where each block ends when rows are taken as long as they fit."""
    ends, block_tokens = [], 0
    for row, length in enumerate(lengths):
        if row and block_tokens + length > tokens:
            ends.append(row)
            block_tokens = 0
        block_tokens += length
    return [*ends, len(lengths)]


def pieces(rollout: Rollout, limits: PassLimits) -> Iterator[Rollout]:
    """The rollout in blocks that one pass may hold; after each the phase has advanced by its rows."""
    advance(0, len(rollout))
    for rows in blocks(rollout.sequence_mask.sum(dim=1).tolist(), limits.rows, limits.tokens):
        yield rollout.select(rows)
        advance(rows.stop, len(rollout))


@torch.no_grad()
def view_output(
    bank: AdapterBank,
    view: View,
    rollout: Rollout,
    temperature: float,
    limits: PassLimits,
    *,
    value_head: str | None = None,
    entropy: bool = False,
) -> PolicyOutput:
    """`forward` through one view without gradient, in pieces within `limits`; [B, T] float32."""
    with bank.view(view, limits.options):
        return PolicyOutput.cat(
            [
                forward(bank, piece, temperature, value_head=value_head, entropy=entropy)
                for piece in pieces(rollout, limits)
            ]
        )


@torch.no_grad()
def view_values(bank: AdapterBank, adapter: str, head: str, rollout: Rollout, limits: PassLimits) -> Tensor:
    """Values [B, T] float32 through a value adapter of its own, without gradient; the LM head isn't run."""
    with bank.using(adapter, options=limits.options):
        values = [apply_head(bank.heads[head], response_hidden(bank, piece)) for piece in pieces(rollout, limits)]
    return torch.cat(values).masked_fill(~rollout.mask, 0.0)


def reference_logprobs(
    bank: AdapterBank,
    reference: View | ReferenceFunction,
    rollout: Rollout,
    temperature: float,
    limits: PassLimits,
    origin: str = "reference",
) -> Tensor:
    """The reference's log-probs [B, T] float32, from a view of the base or a callable.

    PluginError, naming `origin`, when a callable fails, or gives another shape or numbers that aren't finite.
    """
    if isinstance(reference, View):
        return view_output(bank, reference, rollout, temperature, limits).logprobs
    answer = call(reference, rollout, origin)
    if not isinstance(answer, Tensor) or answer.shape != rollout.ids.shape:
        raise PluginError(
            f"{origin}: the reference must give log-probs of shape {list(rollout.ids.shape)}, it gave {describe(answer)}."
        )
    logprobs = answer.detach().float().to(rollout.ids.device)
    logprobs = torch.where(rollout.mask, logprobs, torch.zeros_like(logprobs))
    if not bool(logprobs.isfinite().all()):
        row = int((~logprobs.isfinite()).any(dim=1).nonzero()[0])
        raise PluginError(
            f"{origin}: the reference gave a log-prob that isn't finite for response {row + 1}: {rollout.texts[row][:80]!r}."
        )
    return logprobs
