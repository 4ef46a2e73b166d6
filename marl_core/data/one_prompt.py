"""One rendered prompt as the model reads it, or why it can't be one: the same for rows of a file and for prompts given in Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from marl_core.artifacts.rows import Row
from marl_core.config.run_config import DataSection
from marl_core.data.encoding import Encoder
from marl_core.data.rendering import ControlTokens, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class UsablePrompt:
    """One prompt as the model reads it."""

    row: Row
    index: int
    """Of its row in the source, 0-based."""
    text: Any
    """What the user wrote: a text or a list of messages."""
    seen: Any
    """What the model reads of it: the same, but of a prompt that was cut what is left."""
    tokens: list[int]
    """Empty where no tokenizer was at hand."""
    cut_tokens: int = 0
    """Tokens of its oldest text that were taken away because it was too long."""


@dataclass(frozen=True, slots=True)
class Unusable:
    """Why a prompt can't be used."""

    fault: Literal["empty", "spelled", "long"]
    """It has no text; it spells a control token; it has more tokens than there is room for, and may not or can't be cut."""
    token: str = ""
    """The control token that it spells."""
    length: int = 0
    """Its tokens, where they are too many."""


class PromptReader:
    """Reads prompts one by one, as section `data` says of control tokens and of long ones."""

    def __init__(self, data: DataSection, tokenizer: PreTrainedTokenizerBase | None, room: int) -> None:
        """`room`: positions left for a prompt. Without a tokenizer nothing that is counted in tokens is looked at."""
        self.limit = min(data.max_prompt_tokens or room, room)
        """Tokens that a prompt may have."""
        self._data = data
        self._tools = None if tokenizer is None else (Encoder(tokenizer), ControlTokens(tokenizer))

    def read(self, row: Row, index: int, prompt: Rendered, where: str) -> UsablePrompt | Unusable:
        """`index`, `where`: of the row, as a number from 0 and in words. DataError when the chat template refuses it."""
        if self._tools is None:
            return Unusable("empty") if prompt.empty else UsablePrompt(row, index, prompt.prompt, prompt.prompt, [])
        encoder, control = self._tools
        as_text = self._data.on_control == "as-text"
        spelled = None if self._data.on_control == "parse" else control.spelled_in(prompt)
        if spelled is not None and not (as_text and isinstance(prompt.prompt, str)):
            return Unusable("spelled", token=spelled)  # a chat template can't keep it as text
        tokens = encoder.tokens(prompt, as_text, where)
        if not tokens or prompt.empty:
            return Unusable("empty")
        text, length = encoder.as_written(prompt, where), len(tokens)
        if length <= self.limit:
            return UsablePrompt(row, index, text, text, tokens)
        may_cut = self._data.on_long == "truncate-left"
        cut = encoder.cut(prompt, tokens, self.limit, as_text, where) if may_cut else None
        if cut is None:
            return Unusable("long", length=length)
        shorter, left = cut
        return UsablePrompt(row, index, text, encoder.as_written(shorter, where), left, length - len(left))
