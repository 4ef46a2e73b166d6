"""Rows of prompts as the model will read them: every row checked, everything that speaks against them gathered. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from marl_core.artifacts.rows import Row, is_columnar, read_rows
from marl_core.artifacts.tokenizer import in_vocabulary
from marl_core.config.prompt_template import columns_of
from marl_core.config.run_config import DataSection, RunConfig
from marl_core.data.one_prompt import PromptReader, UsablePrompt
from marl_core.data.rendering import TEMPLATE_COLUMNS, ColumnMissing, Rendered, render
from marl_core.data.row_problems import RowProblems, named
from marl_core.errors import DataError, counted, near_match

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNBOUNDED_ROOM = 2**20
"""Tokens that a prompt may have where the model names no bound."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The prompts of one source, what speaks against them, and what is worth telling."""

    usable: Sequence[UsablePrompt]
    problems: Sequence[DataError]
    remarks: Sequence[str]
    looked_at: int
    """How many rows were read."""
    more: bool = False
    """Whether the source has more rows than were asked for."""


def heldout_section(config: RunConfig) -> DataSection | None:
    """How the held-out prompts are read: as `data` says, from their own source. None without any."""
    section = config.eval
    if section.prompts is None:
        return None
    data = config.data or DataSection(prompts=section.prompts)
    return data.model_copy(update={"prompts": section.prompts, "split": section.split or data.split, "limit": None})


def read_prompts(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase | None,
    room: int = UNBOUNDED_ROOM,
    vocabulary: int | None = None,
    *,
    asked_by: str = "data.prompts",
    most_rows: int | None = None,
) -> Reading:
    """Read a source's rows, `most_rows` of them at most, and check each. DataError when the source itself can't be read.

    `room`: positions left for a prompt; `vocabulary`: tokens that the model has embeddings for. Without a tokenizer nothing that is
    counted in tokens is checked.
    """
    limits = [data.limit] if data.limit is not None else []
    limits += [most_rows + 1] if most_rows is not None else []  # one more tells whether there are more
    rows = read_rows(
        data.prompts, data.split, data.subset, data.revision, asked_by=asked_by, limit=min(limits, default=None)
    )
    reading = _Reader(data, tokenizer, room, vocabulary, asked_by).read(rows[:most_rows])
    return replace(reading, more=len(rows) > reading.looked_at)


class _Reader:
    """Goes through the rows of one source."""

    def __init__(
        self,
        data: DataSection,
        tokenizer: PreTrainedTokenizerBase | None,
        room: int,
        vocabulary: int | None,
        asked_by: str,
    ) -> None:
        self._data, self._vocabulary = data, vocabulary
        self._columnar = is_columnar(data.prompts)
        self._prompts = PromptReader(data, tokenizer, room)
        self._problems = RowProblems(data.prompts, asked_by)
        self._lacking: dict[tuple[str, str], list[int]] = {}
        """Rows without a column, by the config's key that names it and the column."""
        self._empty: list[int] = []
        self._long: list[int] = []
        self._spelled: dict[int, str] = {}

    def read(self, rows: Sequence[Row]) -> Reading:
        """All rows, and what is said of them together."""
        usable = [prompt for index, row in enumerate(rows) if (prompt := self._prompt(row, index)) is not None]
        self._tell_columns(rows)
        self._tell_rows()
        problems, source = self._problems, self._data.prompts
        if not usable and not problems.all():
            problems.errors.append(
                DataError(
                    f"{problems.asked_by}: {source} holds no usable prompt. Each row needs a non-empty {_columns(self._data)}."
                )
            )
        self._tell_cut(usable)
        problems.remarks += _unread_columns(usable, problems)
        return Reading(usable, problems.all(), problems.remarks, len(rows))

    def _prompt(self, row: Row, index: int) -> UsablePrompt | None:
        """A row's prompt; None where it can't be used, which is noted."""
        where = f"row {index + 1} of {self._data.prompts}"
        try:
            prompt = render(self._data, row, self._data.prompts, index, self._columnar)
            return self._usable(row, index, prompt, where)
        except ColumnMissing as error:
            self._lacking.setdefault((error.key, error.column), []).append(index)
            return None
        except DataError as error:
            self._problems.refuse_row(error, where, index)
            return None

    def _usable(self, row: Row, index: int, prompt: Rendered, where: str) -> UsablePrompt | None:
        found = self._prompts.read(row, index, prompt, where)
        if isinstance(found, UsablePrompt):
            self._require_embeddings(found.tokens, where)
            return found
        if found.fault == "spelled":
            self._spelled[index] = found.token
        else:
            (self._empty if found.fault == "empty" else self._long).append(index)
        return None

    def _require_embeddings(self, tokens: Sequence[int], where: str) -> None:
        """DataError when the model has no embedding for one of the tokens."""
        if tokens and not in_vocabulary(max(tokens), self._vocabulary):
            raise DataError(
                f"{self._problems.asked_by}: {where} holds token {max(tokens)}, and the model has embeddings for {self._vocabulary} tokens "
                "only: the tokenizer knows tokens that were added after the model. Give the model's own as model.tokenizer, or a model "
                "that has them."
            )

    def _tell_columns(self, looked_at: Sequence[Row]) -> None:
        """Rows that lack a column: it is theirs to correct while others have it, else the config names another than the data have."""
        for (key, column), rows in self._lacking.items():
            verb, which = ("lacks", "it") if len(rows) == 1 else ("lack", "them")
            there = [str(name) for name in looked_at[rows[0]]]
            near = near_match(column, there)
            meant = f"Did you mean {near!r}? " if near else ""
            way = (
                f"Correct {which}." if len(rows) < len(looked_at) else f"{meant}Name a column that they have in {key}."
            )
            self._problems.errors.append(
                DataError(
                    f"{self._problems.asked_by}: {len(rows):,} of {counted(len(looked_at), 'row')} of {self._data.prompts} {verb} the "
                    f"column {column!r} of {key} ({named(rows)}); row {rows[0] + 1} has: {', '.join(there) or 'nothing'}. {way}"
                )
            )

    def _tell_rows(self) -> None:
        """Rows that are empty, spell a control token, or are too long: refused, or dropped as the config allows."""
        data, tell = self._data, self._problems.rows
        refused = data.on_empty == "error"
        way = "data.on_empty: drop"
        tell(self._empty, refused=refused, what=("is empty", "are empty"), why=way)
        refused = data.on_control != "drop"
        way = (
            "data.on_control: parse where they are meant (a template written out), drop, or (for texts) as-text"
            if refused
            else "data.on_control: drop"
        )
        example = f"control tokens such as {next(iter(self._spelled.values()), '')!r}"
        tell(list(self._spelled), refused=refused, what=(f"holds {example}", f"hold {example}"), why=way)
        refused = data.on_long != "drop"
        way = "a larger data.max_prompt_tokens, or data.on_long: drop" if refused else "data.on_long: drop"
        way += " or truncate-left" if data.on_long == "error" else ""
        longer = counted(self._prompts.limit, "token")
        longer += ", even without the text that may be cut away" if data.on_long == "truncate-left" else ""
        tell(self._long, refused=refused, what=(f"exceeds {longer}", f"exceed {longer}"), why=way)

    def _tell_cut(self, usable: Sequence[UsablePrompt]) -> None:
        cut = [prompt for prompt in usable if prompt.cut_tokens]
        if cut:
            longest, were = max(prompt.cut_tokens for prompt in cut), "was" if len(cut) == 1 else "were"
            self._problems.remarks.append(
                f"{self._problems.asked_by}: {len(cut):,} of {counted(len(usable), 'prompt')} of {self._data.prompts} {were} cut to "
                f"{counted(self._prompts.limit, 'token')}, the oldest text is gone (at most {counted(longest, 'token')} of one prompt; "
                "data.on_long: truncate-left). The model reads what is left; reward functions and reward models read the whole prompt."
            )


def _columns(data: DataSection) -> str:
    return (
        repr(data.field) if data.prompt_template is None else " or ".join(map(repr, columns_of(data.prompt_template)))
    )


def _unread_columns(usable: Sequence[UsablePrompt], problems: RowProblems) -> list[str]:
    """Rows of plain texts with columns that only chat templates read."""
    remarks = []
    for name in TEMPLATE_COLUMNS:
        count = sum(
            isinstance(prompt.text, str) and prompt.row.get(name) not in (None, "", [], {}) for prompt in usable
        )
        if count:
            remarks.append(
                f"{problems.asked_by}: {count:,} of {counted(len(usable), 'prompt')} of {problems.source} "
                f"{'is a text and has' if count == 1 else 'are texts and have'} a column {name!r}, which only a chat's "
                "template reads: the model doesn't see it. Set data.chat: true to make texts user messages."
            )
    return remarks
