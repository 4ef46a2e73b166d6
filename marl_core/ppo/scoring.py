"""Rollout -> ScoredRollout: every role's numbers, each from one pass through its view of the shared base."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.heads import apply_head
from marl_core.bank.inputs import require_room, without_garbage
from marl_core.bank.views import ReferenceFunction, RewardFunction, ScoreView, View
from marl_core.errors import DataError, MarlError, NumericError, PluginError
from marl_core.ppo.logprobs import Banned, chosen_logprobs, logits_logprobs
from marl_core.ppo.token_scores import Scores, combine, is_per_token, number, read_token_scores, score_list
from marl_core.ppo.types import Rollout

LARGEST = torch.finfo(torch.float32).max
"""Scores are kept in float32: beyond this a Python float or int would become infinite."""


WITHOUT_GRADIENT = 32
"""Responses per pass where no ratio is taken from it: rewards and evaluation may use larger pieces than the update."""


@dataclass(frozen=True, slots=True)
class Source:
    """One reward source or judge: its name in metrics, its weight, what gives the scores, and whose it is."""

    name: str
    weight: float
    score: ScoreView | RewardFunction
    origin: str = ""
    role: str = "reward"
    """What errors call it: `reward`, or `judge` for one that is measured and never trained on."""

    @property
    def who(self) -> str:
        """Its role, name and origin, as errors name it."""
        return f"{self.role} {self.name!r}" + (f" ({self.origin})" if self.origin else "")


@dataclass(frozen=True, slots=True)
class Passed:
    """What one pass gives: logprobs and entropy [B, T] float32, values [B, T] or None. Zero under a false mask."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None


def captured(
    bank: AdapterBank, adapter: str, rollout: Rollout, temperature: float, value_head: str | None
) -> Passed | None:
    """The sampling pass's own numbers where they are this policy's, as it is now, of the tokens as they are now; None where a
    pass has to be made.
    """
    seen = rollout.captured
    if seen is None or not seen.belongs_to(bank, adapter, value_head, temperature, rollout.digests()):
        return None
    return Passed(seen.logprobs, seen.entropy, seen.values)


def require_fit(bank: AdapterBank, rollout: Rollout) -> None:
    """DataError when a rollout that somebody made holds tokens or lengths that the base hasn't."""
    without_garbage(rollout.sequence_ids, rollout.sequence_mask, bank.trunk.vocabulary, "rollout")
    require_room(rollout.sequence_mask, bank.trunk.most_positions, "rollout")


def response_hidden(bank: AdapterBank, rollout: Rollout) -> Tensor:
    """Hidden states that predict the response tokens: positions P-1 .. P+T-2, [B, T, H]."""
    hidden = bank.trunk.hidden(rollout.sequence_ids, rollout.sequence_mask)
    start = rollout.prompts.ids.shape[1] - 1
    return hidden[:, start : start + rollout.ids.shape[1]]


def forward(
    bank: AdapterBank, rollout: Rollout, temperature: float, *, value_head: str | None = None, entropy: bool = False
) -> Passed:
    """Log-probs of the response through the active view, with values when a head is named. Keeps the graph if there is one."""
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
    return Passed(empty.masked_scatter(mask, logprobs), empty.masked_scatter(mask, entropies), values)


def _banned(rollout: Rollout) -> Banned | None:
    """The stop tokens at the first places, where `sampling.min_new_tokens` kept them from being sampled."""
    if not rollout.min_tokens or not rollout.stops:
        return None
    early = torch.arange(rollout.ids.shape[1], device=rollout.ids.device) < rollout.min_tokens
    return early.expand_as(rollout.mask)[rollout.mask], torch.tensor(rollout.stops, device=rollout.ids.device)


def blocks(lengths: Sequence[int], size: int, tokens: int | None = None) -> Iterator[slice]:
    """Rows in order: at most `size` a block, and at most `tokens` tokens if given, where a longer row stands alone.

    Each `size` rows make as few blocks as they can, as even as they can be: the largest sets the memory.
    """
    for start in range(0, len(lengths), size):
        rows = lengths[start : start + size]
        ends = _ends(rows, _even(rows, tokens)) if tokens is not None else [len(rows)]
        for first, end in pairwise([0, *ends]):
            yield slice(start + first, start + end)


def _even(lengths: Sequence[int], tokens: int) -> int:
    """The smallest budget that needs no more blocks than `tokens` does."""
    fewest = len(_ends(lengths, tokens))
    return bisect_left(range(tokens), True, key=lambda budget: len(_ends(lengths, budget)) <= fewest)


def _ends(lengths: Sequence[int], tokens: int) -> list[int]:
    """Where each block ends when rows are taken as long as they fit."""
    ends, held = [], 0
    for row, length in enumerate(lengths):
        if row and held + length > tokens:
            ends.append(row)
            held = 0
        held += length
    return [*ends, len(lengths)]


def pieces(rollout: Rollout, size: int, tokens: int | None = None) -> Iterator[Rollout]:
    """The rollout in blocks of at most `size` responses and, if given, `tokens` tokens."""
    for rows in blocks(rollout.sequence_mask.sum(dim=1).tolist(), size, tokens):
        yield rollout.select(rows)


@torch.no_grad()
def view_logprobs(
    bank: AdapterBank,
    view: View,
    rollout: Rollout,
    temperature: float,
    microbatch: int,
    *,
    tokens: int | None = None,
    value_head: str | None = None,
    entropy: bool = False,
) -> Passed:
    """`forward` through one view without gradient, at most `microbatch` responses (and `tokens` tokens) at a time."""
    with bank.view(view):
        parts = [
            forward(bank, piece, temperature, value_head=value_head, entropy=entropy)
            for piece in pieces(rollout, microbatch, tokens)
        ]
    return Passed(
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.entropy for part in parts]),
        torch.cat([part.values for part in parts if part.values is not None]) if value_head else None,
    )


@torch.no_grad()
def view_values(
    bank: AdapterBank, adapter: str, head: str, rollout: Rollout, microbatch: int, tokens: int | None = None
) -> Tensor:
    """Values [B, T] of an adapter of its own; the LM head is never run for them."""
    with bank.using(adapter):
        parts = pieces(rollout, microbatch, tokens)
        values = [apply_head(bank.heads[head], response_hidden(bank, piece)) for piece in parts]
    return torch.cat(values).masked_fill(~rollout.mask, 0.0)


def reference_logprobs(
    bank: AdapterBank,
    reference: View | ReferenceFunction,
    rollout: Rollout,
    temperature: float,
    microbatch: int,
    origin: str = "reference",
    tokens: int | None = None,
) -> Tensor:
    """The reference's log-probs [B, T] float32: a view of the base, or a callable's answer, checked."""
    if isinstance(reference, View):
        return view_logprobs(bank, reference, rollout, temperature, microbatch, tokens=tokens).logprobs
    found = _call(reference, rollout, origin)
    if not isinstance(found, Tensor) or found.shape != rollout.ids.shape:
        raise PluginError(
            f"{origin}: the reference must give log-probs of shape {list(rollout.ids.shape)}, it gave {_describe(found)}."
        )
    found = found.detach().float().to(rollout.ids.device)
    found = torch.where(rollout.mask, found, torch.zeros_like(found))
    if not bool(found.isfinite().all()):
        row = int((~found.isfinite()).any(dim=1).nonzero()[0])
        raise PluginError(
            f"{origin}: the reference gave a log-prob that isn't finite for response {row + 1}: {rollout.texts[row][:80]!r}."
        )
    return found


def score_all(
    bank: AdapterBank, sources: Sequence[Source], rollout: Rollout, microbatch: int, tokens: int | None = None
) -> Scores:
    """All sources' scores and their weighted sum; PluginError when a response was judged by none."""
    given = {source.name: _score(bank, source, rollout, microbatch, tokens) for source in sources}
    scores, judged = combine(given, {source.name: source.weight for source in sources}, rollout)
    if not bool(judged.all()):
        row = int((~judged).nonzero()[0])
        names = ", ".join(source.name for source in sources)
        raise PluginError(
            f"reward: no source ({names}) gave response {row + 1} a score; its text begins {rollout.texts[row][:80]!r}."
        )
    return scores


def score_sources(
    bank: AdapterBank, sources: Sequence[Source], rollout: Rollout, microbatch: int, tokens: int | None = None
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Weighted sum [B] of all sources, and each source's own scores [B] (NaN where a source abstained)."""
    scores = score_all(bank, sources, rollout, microbatch, tokens)
    return scores.total, scores.parts


def judge_all(
    bank: AdapterBank, judges: Sequence[Source], rollout: Rollout, microbatch: int, tokens: int | None = None
) -> dict[str, Tensor]:
    """Each judge's scores [B] times its weight, NaN where it abstained: nothing is trained on them, so it may, even from all."""
    given = {judge.name: _score(bank, judge, rollout, microbatch, tokens) for judge in judges}
    scores, _ = combine(given, {judge.name: judge.weight for judge in judges}, rollout)
    return {judge.name: judge.weight * scores.parts[judge.name] for judge in judges}


def own_scores(found: object, rollout: Rollout) -> Scores:
    """A caller's own scores, [B] or [B, T]; DataError unless there is a number for each response."""
    scores, judged = combine({"own": as_scores(found, rollout, "scores", DataError)}, {"own": 1.0}, rollout)
    if not bool(judged.all()):
        raise DataError("scores: a score of one's own can't be None; give a number for each response.")
    return Scores(scores.total, {}, scores.tokens)


def _score(bank: AdapterBank, source: Source, rollout: Rollout, microbatch: int, tokens: int | None) -> Tensor:
    who = source.who
    if isinstance(source.score, ScoreView):
        view = source.score
        scores = torch.cat(
            [bank.score(view, piece.sequence_ids, piece.sequence_mask) for piece in pieces(rollout, microbatch, tokens)]
        )
        if not bool(scores.isfinite().all()):
            row = int((~scores.isfinite()).nonzero()[0])
            raise NumericError(
                f"{who}: response {row + 1} got {scores[row].item()}; its text begins {rollout.texts[row][:80]!r}."
            )
        return scores
    return as_scores(_call(source.score, rollout, who), rollout, who)


def as_scores(found: object, rollout: Rollout, who: str, error: type[MarlError] = PluginError) -> Tensor:
    """What a reward function gave, as a tensor [B], or [B, T] when it scored tokens; None becomes NaN (it abstains).

    Taken is what `torch.tensor(list, dtype=torch.float32)` takes: numbers and booleans of Python, numpy and torch, in a list,
    tensor, array or column of a table; [B, 1], as a classifier's logits come, is [B]. `error` for anything else.
    """
    count = len(rollout)
    values = score_list(found, who, error)
    if values is None:
        raise error(f"{who} gave {_describe(found)}; return a list of {count} numbers, one for each response.")
    if len(values) != count:
        raise error(f"{who} gave {len(values)} rewards for {count} responses; return exactly one for each.")
    if is_per_token(values):
        return read_token_scores(values, rollout, who, error)
    scores = [number(value) for value in values]
    for row, score in enumerate(scores):
        if values[row] is not None and not (score is not None and abs(score) <= LARGEST):  # NaN fails too
            raise error(
                f"{who}: response {row + 1} got {values[row]!r:.80}, not a finite number; its text begins "
                f"{rollout.texts[row][:80]!r}."
            )
    numbers_only = [math.nan if score is None else score for score in scores]
    return torch.tensor(numbers_only, dtype=torch.float32, device=rollout.ids.device)


def _call(function: Callable[[Rollout], object], rollout: Rollout, who: str) -> object:
    try:
        with torch.no_grad():
            return function(rollout)
    except MarlError:
        raise
    except (Exception, SystemExit, GeneratorExit) as error:
        said = [
            f"{who} failed on a batch of {len(rollout)}: {type(error).__name__}: {error}",
            *getattr(error, "__notes__", []),
        ]
        raise PluginError(". ".join(said)) from error


def _describe(found: object) -> str:
    return f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
