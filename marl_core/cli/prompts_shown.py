"""`marl check --show`: prompts as the model reads them, special tokens and all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from marl_core.data.check import InputCheck
from marl_core.data.one_prompt import UsablePrompt
from marl_core.errors import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"
SHADES = ("", "underline")
"""Tokens in turn, so that a terminal shows where each ends."""


def show_prompts(inputs: InputCheck, count: int, console: Console) -> None:
    """The first `count` prompts of each source: number of tokens, what was cut, and the text with its special tokens.

    On a terminal every other token is underlined and special tokens are coloured; elsewhere it is the plain text.
    """
    for key, reading in inputs.readings.items():
        for prompt in reading.usable[:count]:
            console.print(Text(_heading(key, prompt), "bold"), soft_wrap=True)
            console.print(_body(prompt, inputs.tokenizer), soft_wrap=True)
    if inputs.tokenizer is None:
        console.print(
            Text("These are the data's own texts: without the tokenizer nobody can say what the model reads.", "yellow")
        )


def _heading(key: str, prompt: UsablePrompt) -> str:
    tokens = f": {counted(len(prompt.tokens), 'token')}" if prompt.tokens else ""
    cut = f", cut: {counted(prompt.cut_tokens, 'token')} of the oldest text" if prompt.cut_tokens else ""
    return f"{key}, row {prompt.index + 1}{tokens}{cut}"


def _body(prompt: UsablePrompt, tokenizer: PreTrainedTokenizerBase | None) -> Text:
    if tokenizer is None or not prompt.tokens:
        return Text(str(prompt.seen))
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    body = Text()
    for position, (tokens, text) in enumerate(pieces(tokenizer, prompt.tokens)):
        body.append(text, "magenta" if special.intersection(tokens) else SHADES[position % len(SHADES)])
    return body


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> Iterator[tuple[Sequence[int], str]]:
    """The tokens with the text of each; those that make one character together are one piece.

    Where single tokens don't add up to the whole text (a decoder that drops the first space), it is one piece.
    """
    found: list[tuple[Sequence[int], str]] = []
    start = 0
    for end in range(1, len(tokens) + 1):
        text = str(tokenizer.decode(list(tokens[start:end])))
        if not text.endswith(REPLACEMENT_CHARACTER) or end == len(tokens):
            found.append((tokens[start:end], text))
            start = end
    whole = str(tokenizer.decode(list(tokens)))
    yield from found if "".join(text for _, text in found) == whole else [((), whole)]
