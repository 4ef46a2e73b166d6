"""Stop strings: a response ends with the token that completes one of them in the decoded text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from marl_core.ppo.texts import ResponseDecoder, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARGIN_TOKENS = 8
"""Tokens decoded before those that a string can span: a decoder may write the first ones differently at a cut."""


@dataclass(frozen=True, slots=True)
class StopStrings:
    """The strings, and the tokenizer in whose decoded text (special tokens left out) they are looked for."""

    strings: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    special: frozenset[int]
    window: int
    """Tokens at the end of a response that can hold a string completed there: a token is a byte or more."""

    @classmethod
    def of(cls, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> StopStrings | None:
        """None when there are no strings: then nothing is decoded."""
        if not strings:
            return None
        window = max(len(string.encode("utf-8", "surrogatepass")) for string in strings) + MARGIN_TOKENS
        return cls(tuple(strings), tokenizer, special_ids(tokenizer), window)

    def met(self, ids: Tensor, decoders: Sequence[ResponseDecoder] = ()) -> Tensor:
        """Which responses ids [B, T] int64 hold a string that their last token completes, [B] bool.

        Every shorter prefix must have been asked before, as in sampling. `decoders`: one for each response, where its text
        goes on with its prompt's.
        """
        decoders = decoders or [ResponseDecoder(self.tokenizer)] * len(ids)
        completed = [
            self._holds(self._tail(row), decoder) and self._holds(row, decoder)
            for row, decoder in zip(ids.tolist(), decoders, strict=True)
        ]
        return torch.tensor(completed, dtype=torch.bool, device=ids.device)

    def cut(self, text: str) -> str:
        """The text before the first string."""
        return text[
            : min([position for string in self.strings if (position := text.find(string)) >= 0], default=len(text))
        ]

    def _tail(self, row: list[int]) -> list[int]:
        tail: list[int] = []
        for token in reversed(row):
            if token not in self.special:
                tail.append(token)
            if len(tail) == self.window:
                break
        return tail[::-1]

    def _holds(self, row: list[int], decoder: ResponseDecoder) -> bool:
        text = decoder.text(row)
        return any(string in text for string in self.strings)


class Criterion:
    """Stop strings for transformers' `generate`, looking at the response alone."""

    def __init__(self, strings: StopStrings, prompt_tokens: int, decoders: Sequence[ResponseDecoder] = ()) -> None:
        self._strings, self._start, self._decoders = strings, prompt_tokens, decoders
        self.lengths: Tensor | None = None
        """Tokens [B] int64 of each response up to the one that completed a string; 0 where none did."""

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        """Done [B] bool, from prompt and response [B, P + T]."""
        response = input_ids[:, self._start :]
        met = self._strings.met(response, self._decoders)
        lengths = torch.zeros_like(response[:, 0]) if self.lengths is None else self.lengths
        self.lengths = torch.where(met & (lengths == 0), response.shape[1], lengths)
        return met
