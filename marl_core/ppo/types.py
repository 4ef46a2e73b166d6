"""The data of one PPO step: Prompts -> Rollout -> ScoredRollout -> Advantages -> UpdateStats -> StepStats.

Letters: B responses, P prompt tokens (left-padded), T response tokens (right-padded). Masks are boolean and
mean "this token counts".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from marl_core.bank.inputs import as_floats, as_ids, as_mask, as_rows, as_table, plain, require_token_ids
from marl_core.errors import DataError
from marl_core.ppo.data_columns import shown_row
from marl_core.ppo.policy_output import PolicyOutput
from marl_core.ppo.reward_context import Logged
from marl_core.ppo.texts import response_texts, response_tokens
from marl_core.registry.deprecation import warn_deprecated


def pad_rows(
    rows: Sequence[Sequence[int]], pad: int | None, side: str, who: str = "token lists"
) -> tuple[Tensor, Tensor]:
    """Token lists as ids[B, L] int64 and mask[B, L] bool, padded with `pad` on the "left" or "right".

    What stands under a false mask is never read: a tokenizer without a pad token (None) pads with 0.
    """
    rows = as_rows(rows, who)
    require_token_ids(rows, who)
    fill = 0 if pad is None else pad
    if not hasattr(fill, "__int__"):
        raise DataError(f"{who}: pad: expected a token's number, or None, got {pad!r}.")
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), int(fill), dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, where] = torch.tensor(list(row), dtype=torch.int64)
        mask[index, where] = True
    return ids, mask


def _convert(record: object, **values: Any) -> None:
    """Put converted values into a frozen dataclass that is being made."""
    for name, value in values.items():
        object.__setattr__(record, name, value)


def _texts(texts: Any) -> Sequence[Any]:
    """Texts or chats as a sequence, from a list, an array or a column of a table."""
    if isinstance(texts, str):
        raise DataError("texts: give a list with a text for each row, not one text.")
    if texts is not None and not hasattr(texts, "__iter__"):
        raise DataError(f"texts: give a list with a text for each row, not {texts!r}.")
    if hasattr(texts, "to_pylist"):  # pyarrow's own scalars are no texts
        return list(texts.to_pylist())
    return () if texts is None else texts if isinstance(texts, list | tuple) else list(texts)


@dataclass(frozen=True, slots=True)
class Prompts:
    """A batch of prompts: ids[B, P] int64 and mask[B, P] bool (left-padded), the data rows, and their texts."""

    ids: Tensor
    mask: Tensor
    rows: Sequence[Mapping[str, Any]]
    texts: Sequence[Any] = ()
    """What the user wrote: a text, or a list of chat messages."""
    cut_tokens: Sequence[int] = ()
    """How many tokens of its oldest text each prompt lost because it was too long; empty when none lost any."""
    seen_texts: Sequence[Any] = ()
    """What the model reads of each prompt, as `texts` where nothing was cut; empty when all are whole."""

    def __post_init__(self) -> None:
        ids = as_ids(self.ids, "Prompts.ids")
        rows = as_table(self.rows, len(ids), "Prompts.rows")
        _convert(self, rows=rows, texts=_texts(self.texts), ids=as_ids(ids, "Prompts.ids", (len(rows), ids.shape[1])))
        _convert(self, mask=as_mask(self.mask, "Prompts.mask", tuple(self.ids.shape)).to(self.ids.device))
        if self.texts and len(self.texts) != len(rows):
            raise DataError(f"Prompts.texts: {len(self.texts)} texts for {len(rows)} prompts.")
        for name in ("cut_tokens", "seen_texts"):
            if getattr(self, name) and len(getattr(self, name)) != len(rows):
                raise DataError(f"Prompts.{name}: {len(getattr(self, name))} entries for {len(rows)} prompts.")
        if not bool(self.mask[:, -1:].all()) or bool((self.mask[:, :-1] & ~self.mask[:, 1:]).any()):
            raise DataError("Prompts: pad on the left: each row's tokens must end at the last column, without holes.")

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(
        cls,
        tokens: Sequence[Sequence[int]],
        pad: int | None,
        rows: Any = None,
        texts: Sequence[Any] = (),
        mask: object = None,
        cut_tokens: Sequence[int] = (),
        seen_texts: Sequence[Any] = (),
    ) -> Prompts:
        """Prompts from token lists: lists, tensors or arrays of any integers.

        `rows`: the data's columns, one mapping for each prompt, or columns by name with an entry for each. `mask`: what a
        tokenizer that was asked to pad gives beside its ids; without it every token counts. `cut_tokens`, `seen_texts`: as the fields.
        """
        token_lists = as_rows(tokens, "Prompts.of: tokens")
        if mask is not None:
            counts = as_mask(
                mask, "Prompts.of: mask", (len(token_lists), len(token_lists[0]) if token_lists else 0)
            ).tolist()
            token_lists = [
                [token for token, counted in zip(*pair, strict=True) if counted]
                for pair in zip(token_lists, counts, strict=True)
            ]
        ids, mask = pad_rows(token_lists, pad, "left", "Prompts.of: tokens")
        rows = rows if rows is not None else [{} for _ in range(len(ids))]
        return cls(ids, mask, rows, texts, cut_tokens, seen_texts)

    def with_texts(self, tokenizer: Any) -> Prompts:
        """The same prompts; texts that nobody gave are decoded from the tokens, so that rewards can read them."""
        if self.texts:
            return self
        rows = [row[keep].tolist() for row, keep in zip(self.ids, self.mask, strict=True)]
        return replace(self, texts=tokenizer.batch_decode(rows, skip_special_tokens=True))

    def cut_of(self, index: int) -> int:
        """How many tokens of its oldest text this prompt lost; 0 for one that is whole."""
        return int(self.cut_tokens[index]) if self.cut_tokens else 0

    def seen(self, index: int) -> Any:
        """What the model reads of this prompt, a text or a list of messages; an empty text where nobody gave any."""
        texts = self.seen_texts or self.texts
        return texts[index] if texts else ""

    def repeat(self, times: int) -> Prompts:
        """Each prompt `times` times in a row: groups for estimators that compare responses."""
        return self if times == 1 else self.select(torch.arange(len(self)).repeat_interleave(times))

    def select(self, rows: Tensor | slice) -> Prompts:
        """Some of the prompts, padded as all of them are."""
        index = torch.arange(len(self))[rows].tolist()
        texts = [self.texts[i] for i in index] if self.texts else ()
        cut = [self.cut_tokens[i] for i in index] if self.cut_tokens else ()
        seen = [self.seen_texts[i] for i in index] if self.seen_texts else ()
        return Prompts(self.ids[index], self.mask[index], [self.rows[i] for i in index], texts, cut, seen)

    def shown_row(self, index: int) -> dict[str, Any]:
        """The data's columns beside this prompt, as they are written beside samples: short, secrets struck out."""
        return shown_row(self.rows[index], self.texts[index] if self.texts else None)

    def to(self, device: torch.device | str) -> Prompts:
        """The same prompts with their tensors on `device`."""
        return replace(self, ids=self.ids.to(device), mask=self.mask.to(device))


@dataclass(frozen=True, slots=True)
class Rollout:
    """Responses: ids[B, T] int64, mask[B, T] bool (true up to and including the stop token), their texts.

    `finished[B]` bool says which responses ended with a stop token. The mask comes from where sampling
    stopped, never from a pad id. No token of `stops` could be sampled at the first `min_tokens` positions, and log-probs
    are of that distribution: the distribution sampled from is the one scored.
    """

    prompts: Prompts
    ids: Tensor
    mask: Tensor
    texts: Sequence[str]
    finished: Tensor
    min_tokens: int = 0
    stops: tuple[int, ...] = ()
    behavior: PolicyOutput | None = None
    """The behavior policy's output: log-probs and values of the sampling pass, where they are exact enough to be the old ones."""

    def __post_init__(self) -> None:
        ids = as_ids(self.ids, "Rollout.ids")
        shape = (len(self.prompts), ids.shape[1])
        _convert(
            self,
            prompts=self.prompts if self.prompts.ids.device == ids.device else self.prompts.to(ids.device),
            ids=as_ids(ids, "Rollout.ids", shape),
            mask=as_mask(self.mask, "Rollout.mask", shape).to(ids.device),
            finished=as_mask(self.finished, "Rollout.finished", shape[:1]).to(ids.device),
            texts=_texts(self.texts),
        )
        if len(self.texts) != len(self.prompts):
            raise DataError(f"Rollout.texts: {len(self.texts)} texts for {len(self.prompts)} prompts.")
        if not bool(self.mask.any(dim=1).all()):
            empty = (~self.mask.any(dim=1)).nonzero().flatten().tolist()
            raise DataError(f"Rollout: responses {empty[:5]} have no token; the stop token itself counts as one.")

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def from_responses(
        cls,
        prompts: Prompts,
        responses: Sequence[Sequence[int]] | Sequence[str],
        tokenizer: Any,
        stop_ids: Sequence[int] | int | None = None,
    ) -> Rollout:
        """A rollout of one's own responses: texts, or token lists (or tensors, arrays); what follows a stop token is cut off.

        A text is a whole response: a stop token is put behind it. For one that was broken off give tokens. `stop_ids`: the
        tokens that end a response, the tokenizer's EOS when absent. Prompts are texts too in `Runner.rollout`.
        """
        if not isinstance(prompts, Prompts):
            raise DataError(
                f"prompts: expected Prompts, got {type(prompts).__name__}. Texts, chats and rows are tokenized as a run reads them by "
                "runner.rollout(prompts, responses), or by runner.encode(prompts)."
            )
        stops, prompts = _stops(tokenizer.eos_token_id if stop_ids is None else stop_ids), prompts.with_texts(tokenizer)
        listed = _as_tokens(responses, prompts, tokenizer, stops)
        cut = [_up_to_stop(response, stops) for response in as_rows(listed, "responses")]
        _require_count(len(cut), prompts)
        ids, mask = pad_rows(cut, tokenizer.pad_token_id, "right", "responses")
        finished = torch.tensor([bool(row) and row[-1] in stops for row in cut])
        device, texts = prompts.ids.device, response_texts(tokenizer, prompts, cut)
        return cls(prompts, ids.to(device), mask.to(device), texts, finished.to(device))

    @property
    def sequence_ids(self) -> Tensor:
        """Prompt and response, [B, P + T]."""
        return torch.cat([self.prompts.ids, self.ids], dim=1)

    @property
    def sequence_mask(self) -> Tensor:
        """Mask of `sequence_ids`, [B, P + T]."""
        return torch.cat([self.prompts.mask, self.mask], dim=1)

    @property
    def captured(self) -> PolicyOutput | None:
        """The older name of `behavior`, for one version."""
        warn_deprecated("Rollout.captured", "Rollout.behavior", "0.1")
        return self.behavior

    def digests(self) -> Tensor:
        """A hash [B] int64 of each row: its prompt's and response's tokens, and the stop tokens that couldn't be sampled."""
        parts = ((self.prompts.ids, self.prompts.mask), (self.ids, self.mask))
        prompts, responses = (
            [row[keep] for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)] for ids, mask in parts
        )
        rows = zip(prompts, responses, strict=True)
        banned = (self.min_tokens, self.stops if self.min_tokens else ())
        digests = [hash((*(tuple(part.tolist()) for part in row), banned)) for row in rows]
        return torch.tensor(digests, dtype=torch.int64, device=self.ids.device)

    @property
    def lengths(self) -> Tensor:
        """Response tokens that count, [B] int64."""
        return self.mask.sum(dim=1)

    def to(self, device: torch.device | str) -> Rollout:
        """The same rollout with its tensors on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("prompts", "ids", "mask", "finished")}
        return replace(self, **moved, behavior=None if self.behavior is None else self.behavior.to(device))

    def select(self, rows: Tensor | slice) -> Rollout:
        """Some of the responses."""
        rows = rows.to(self.ids.device) if isinstance(rows, Tensor) else rows
        index = torch.arange(len(self), device=self.ids.device)[rows].tolist()
        return replace(
            self,
            prompts=self.prompts.select(torch.tensor(index, dtype=torch.int64)),
            ids=self.ids[rows],
            mask=self.mask[rows],
            texts=[self.texts[i] for i in index],
            finished=self.finished[rows],
            behavior=None if self.behavior is None else self.behavior.select(rows),
        )


def _as_tokens(responses: Any, prompts: Prompts, tokenizer: Any, stops: set[int]) -> Any:
    """Responses given as texts as token lists that end with a stop token; what else was given as it is."""
    if isinstance(responses, str):
        raise DataError("responses: give a list with a response for each prompt, not one text.")
    listed = list(responses) if isinstance(responses, Iterable) and not isinstance(responses, Tensor) else []
    if not listed or not all(isinstance(response, str) for response in listed):
        return responses
    _require_count(len(listed), prompts)
    if not stops:
        raise DataError("responses: no token ends a text: this tokenizer has no EOS. Give stop_ids, or token lists.")
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in stops else min(stops)
    pairs = zip(prompts.texts, listed, strict=True)
    return [[*response_tokens(tokenizer, prompt, response), end] for prompt, response in pairs]


def _require_count(count: int, prompts: Prompts) -> None:
    if count != len(prompts):
        raise DataError(f"responses: {count} responses for {len(prompts)} prompts; repeat a prompt that has several.")


def _stops(value: Any) -> set[int]:
    """Stop tokens: one number, or numbers in anything, None among them left out."""
    ids = plain(value)
    ids = list(ids) if isinstance(ids, list) else [ids]
    if not all(stop is None or (hasattr(stop, "__int__") and not isinstance(stop, bool)) for stop in ids):
        raise DataError(f"stop_ids: expected tokens' numbers, got {value!r:.80}.")
    return {int(stop) for stop in ids if stop is not None}


def _up_to_stop(row: list[int], stops: set[int]) -> list[int]:
    for index, token in enumerate(row):
        if token in stops:
            return row[: index + 1]
    return row


@dataclass(frozen=True, slots=True)
class ScoredRollout:
    """A rollout with every role's numbers, all without gradient.

    logprobs[B, T] of the policy before the update; ref_logprobs[B, T], None when the KL coefficient is 0;
    values[B, T], None without a value function; scores[B] as the rewards gave them, summed with their weights;
    parts: each reward source's own scores [B]; entropy[B, T] of the policy in nats; shaped_scores[B]: what PPO learns from, the
    scores themselves where nothing shapes them; token_scores[B, T]: the part of `shaped_scores` that lands on single tokens (the
    rest lands on the last one), None when no reward scores tokens.
    """

    rollout: Rollout
    logprobs: Tensor
    ref_logprobs: Tensor | None
    values: Tensor | None
    scores: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    entropy: Tensor | None = None
    shaped_scores: Tensor = field(default_factory=Tensor)
    """What PPO learns from; `scores` when not given."""
    token_scores: Tensor | None = None
    logged: Logged | None = None
    """What reward functions logged beside their scores."""

    def __post_init__(self) -> None:
        shape, device = tuple(self.rollout.ids.shape), self.rollout.ids.device
        shapes = dict.fromkeys(("logprobs", "ref_logprobs", "values", "entropy", "token_scores"), shape)
        if not self.shaped_scores.numel():
            _convert(self, shaped_scores=self.scores)
        for name, size in {**shapes, "scores": shape[:1], "shaped_scores": shape[:1]}.items():
            if getattr(self, name) is not None:
                _convert(self, **{name: as_floats(getattr(self, name), f"ScoredRollout.{name}", size).to(device)})

    def __getattr__(self, name: str) -> Any:
        """The older name of `scores`, for one version."""
        if name != "raw_scores":
            raise AttributeError(f"ScoredRollout has no {name!r}")
        warn_deprecated("ScoredRollout.raw_scores", "ScoredRollout.scores (what PPO sees is shaped_scores)", "0.1")
        return self.scores

    def select(self, rows: Tensor | slice) -> ScoredRollout:
        """Some of the responses, with everything that has a row for each; `logged` is of the whole batch, and is dropped."""
        return _each_tensor(replace(self, logged=None), lambda tensor: tensor[rows], self.rollout.select(rows))

    def to(self, device: torch.device | str) -> ScoredRollout:
        """The same on `device`."""
        return _each_tensor(self, lambda tensor: tensor.to(device), self.rollout.to(device))


def _each_tensor(scored: ScoredRollout, change: Callable[[Tensor], Tensor], rollout: Rollout) -> ScoredRollout:
    """A scored rollout with each of its own tensors changed, and this rollout."""
    changed: dict[str, Any] = {
        item.name: change(value) for item in fields(scored) if isinstance(value := getattr(scored, item.name), Tensor)
    }
    return replace(
        scored, **changed, rollout=rollout, parts={name: change(part) for name, part in scored.parts.items()}
    )


@dataclass(frozen=True, slots=True)
class Advantages:
    """What the update learns from, [B, T] float32: kl in nats, rewards, advantages, and returns (None without values)."""

    kl: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor | None

    def select(self, rows: Tensor | slice) -> Advantages:
        """Those of some responses."""
        returns = None if self.returns is None else self.returns[rows]
        return Advantages(self.kl[rows], self.rewards[rows], self.advantages[rows], returns)

    def to(self, device: torch.device | str) -> Advantages:
        """The same on `device`."""
        returns = None if self.returns is None else self.returns.to(device)
        return Advantages(self.kl.to(device), self.rewards.to(device), self.advantages.to(device), returns)

    def fitted(self, rollout: Rollout) -> Advantages:
        """The same as float32 on the rollout's device; DataError unless each tensor has its shape."""
        shape, device = tuple(rollout.ids.shape), rollout.ids.device
        tensors: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        for name, value in tensors.items():
            if value is not None or name != "returns":
                tensors[name] = as_floats(value, f"Advantages.{name}", shape).to(device)
        return Advantages(**tensors)


class _Floats:
    """Shared by the two stats classes."""

    __slots__ = ()

    def as_dict(self) -> dict[str, float]:
        """All numbers by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]  # dataclasses


@dataclass(frozen=True, slots=True)
class UpdateStats(_Floats):
    """Means over all minibatches of one update."""

    policy_loss: float
    value_loss: float
    clipfrac: float
    value_clipfrac: float
    approx_kl: float
    """Mean of (log ratio)^2 / 2, nats per token."""
    ratio_mean: float
    ratio_std: float
    ratio_min: float
    ratio_max: float
    first_ratio_error: float
    """Largest |ratio - 1| in the first minibatch of the first epoch."""
    policy_grad_norm: float
    value_grad_norm: float
    learning_rate: float
    optimizer_steps: float
    stopped_early: float
    """1 when max_kl ended the update before its last epoch."""

    @property
    def approxkl(self) -> float:
        """The older name of `approx_kl`, for one version."""
        warn_deprecated("UpdateStats.approxkl", "UpdateStats.approx_kl", "0.1")
        return self.approx_kl


class Metrics(dict[str, float]):
    """Numbers by the field's names. A name of before is understood for one version, with a warning."""

    OLD: ClassVar[Mapping[str, str]] = {"policy/approxkl": "policy/approx_kl"}

    def __missing__(self, name: str) -> float:
        """The number under its present name."""
        if name not in self.OLD:
            raise KeyError(name)
        warn_deprecated(f"the metric {name}", self.OLD[name], "0.1")
        return self[self.OLD[name]]


@dataclass(frozen=True, slots=True)
class StepStats:
    """One PPO step in floats: `metrics` uses the field's names (objective/kl, policy/clipfrac, ...)."""

    step: int
    metrics: Mapping[str, float]

    def __post_init__(self) -> None:
        _convert(self, metrics=Metrics(self.metrics))

    def __getitem__(self, name: str) -> float:
        return self.metrics[name]

    @property
    def reward_mean(self) -> float:
        """Mean score of the step before shaping."""
        return self.metrics["objective/scores"]

    @property
    def kl_nats(self) -> float:
        """Mean KL to the reference, nats per response."""
        return self.metrics["objective/kl"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out numbers at one step: means, with the standard deviation over sampling seeds (0 for one seed).

    Rewards are before shaping, lengths in tokens, `finished` is the share of responses that ended with a stop token.
    """

    step: int
    reward: float
    """NaN for a config without a reward: then KL, lengths and judges alone are measured."""
    reward_std: float
    kl: float
    """KL to the reference, nats per response; 0 when there is no reference."""
    kl_std: float
    length: float
    length_std: float
    finished: float
    judges: Mapping[str, Mapping[str, float | None]]
    """Of each judge `mean` and `std` over what it judged, None when it abstained from all; `judged`: the share it judged."""
    samples: Sequence[Mapping[str, Any]]
    logged: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Numbers that reward functions logged: mean, and std over seeds."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """The result of a run: its folder, steps done, the last step's numbers, and the evaluations before and after training."""

    folder: str | None
    steps: int
    last: StepStats | None
    before: Evaluation | None = None
    after: Evaluation | None = None
    stopped: str | None = None
    """Why it ended before its last step, where a strategy or `Runner.request_stop` asked for that."""
