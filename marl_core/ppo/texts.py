"""The text of a response as it stands after its prompt, so that prompt text and response text make what was written.

A decoder that sees the response alone drops what depends on its neighbours: the space that sentencepiece writes before
the first word, the half of a character that the prompt's last token began, WordPiece's marks inside a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from marl_core.artifacts.messages import continues_prompt

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class TokenizedPrompts(Protocol):
    """What is read of `Prompts`: ids and mask [B, P], and what the user wrote, a text or chat for each row."""

    @property
    def ids(self) -> Tensor: ...  # noqa: D102

    @property
    def mask(self) -> Tensor: ...  # noqa: D102

    @property
    def texts(self) -> Sequence[Any]: ...  # noqa: D102


WINDOW_TOKENS = 16
"""Tokens of the prompt that are decoded before the response; more where they begin inside a character."""
REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class ResponseDecoder:
    """Decodes responses to one prompt: the text that tokens add to it, special tokens left out."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = (), special: frozenset[int] | None = None
    ) -> None:
        """`before`: the prompt's tokens, none where the response is a text of its own; `special`: ids that have no text."""
        self._tokenizer = tokenizer
        skipped = special_ids(tokenizer) if special is None else special
        prompt_ids = [token for token in before if token not in skipped]
        size = WINDOW_TOKENS
        self._before, self._head = prompt_ids[-size:], self._decode(prompt_ids[-size:])
        while size < len(prompt_ids) and self._head.startswith(REPLACEMENT_CHARACTER):
            size *= 2
            self._before, self._head = prompt_ids[-size:], self._decode(prompt_ids[-size:])

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, prompts: TokenizedPrompts) -> list[ResponseDecoder]:
        """One for each prompt. A response that opens a chat's answer is a text of its own: the space before it is the template's."""
        special = special_ids(tokenizer)
        texts = prompts.texts or [""] * len(prompts.ids)
        return [
            cls(tokenizer, ids[keep].tolist() if continues_prompt(text) else (), special)
            for ids, keep, text in zip(prompts.ids.cpu(), prompts.mask.cpu(), texts, strict=True)
        ]

    def text(self, ids: Sequence[int]) -> str:
        """What these response tokens add to the prompt's text."""
        decoded = self._decode([*self._before, *ids])
        for head in (self._head, self._head.rstrip(REPLACEMENT_CHARACTER)):
            if decoded.startswith(head):
                return decoded[len(head) :]
        return self._decode(ids)  # the decoder rewrote the prompt's end: where the response begins can't be told

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""


def response_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: TokenizedPrompts, responses: Sequence[Sequence[int]]
) -> list[str]:
    """Each response's text after its prompt, special tokens left out."""
    decoders = ResponseDecoder.of(tokenizer, prompts)
    return [decoder.text(ids) for decoder, ids in zip(decoders, responses, strict=True)]


def response_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Any, response: str) -> list[int]:
    """Tokens of a response's text as it goes on from a prompt (a text or a chat), without an end token.

    A tokenizer that writes a space before the first word doesn't write one inside a text: the whole is tokenized, where its tokens
    begin with the prompt's.
    """

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    if isinstance(prompt, str) and prompt:
        before, whole = tokens(prompt), tokens(prompt + response)
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return tokens(response)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that decoding leaves out when it skips special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    return frozenset(getattr(tokenizer, "all_special_ids", ())) | {
        token_id for token_id, added_token in added if added_token.special
    }
