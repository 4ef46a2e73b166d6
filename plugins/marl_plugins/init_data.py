"""`marl init` looks at the prompts: columns, what a prompt looks like, and rows to hold out."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marl_core import message_text, read_rows

Row = Mapping[str, Any]

LIKELY_COLUMNS = ("prompt", "messages", "question", "instruction", "query", "text", "input")
"""Names that a column of prompts usually has, the likeliest first."""
MAX_SHOWN = 60
MAX_HELD_OUT = 32
HELD_OUT_SHARE = 10
"""One row of so many is held out, where nobody says how many."""


@dataclass(frozen=True)
class PromptsFile:
    """A prompts file on this machine, read."""

    name: str
    rows: list[Row]

    @classmethod
    def read(cls, name: str) -> PromptsFile | None:
        """None where the answer is no file on this machine. DataError where it is one that can't be read."""
        return cls(name, read_rows(name, asked_by="data.prompts")) if os.path.isfile(os.path.expanduser(name)) else None

    @property
    def columns(self) -> list[str]:
        """Columns of the first row, those that may hold a prompt."""
        return [str(name) for name, value in self.rows[0].items() if isinstance(value, str | list | int | float)]

    @property
    def likely_column(self) -> str | None:
        """The column that is probably the prompt's; None where that can't be told."""
        known = [name for name in LIKELY_COLUMNS if name in self.columns]
        return known[0] if known else self.columns[0] if len(self.columns) == 1 else None

    def described(self) -> str:
        """Rows, columns and the first row, in one line."""
        shown = ", ".join(f"{name}: {shortened(value)}" for name, value in self.rows[0].items())
        return f"{self.name}: {len(self.rows)} row{'s' if len(self.rows) != 1 else ''}. The first one: {shown}"

    def is_chat(self, column: str) -> bool:
        """Whether the column holds messages already, at least in the first row."""
        value = self.rows[0].get(column)
        return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith('[{"role"'))

    def usual_hold_out(self) -> int:
        """How many rows to hold out where nobody says so; 0 where there are too few to spare any."""
        return min(MAX_HELD_OUT, len(self.rows) // HELD_OUT_SHARE)

    def split(self, held_out: int) -> dict[Path, str]:
        """Two files of JSON lines beside it, by name: the rows to train on and `held_out` others, drawn with a fixed seed."""
        chosen = set(random.Random(0).sample(range(len(self.rows)), held_out))
        stem = Path(self.name).expanduser().with_suffix("")
        parts = {"train": [], "heldout": []}  # type: dict[str, list[str]]
        for index, row in enumerate(self.rows):
            parts["heldout" if index in chosen else "train"].append(
                json.dumps(dict(row), ensure_ascii=False, default=str)
            )
        return {Path(f"{stem}-{part}.jsonl"): "\n".join(lines) + "\n" for part, lines in parts.items()}


def shortened(value: Any) -> str:
    """A cell for people, in a few words; of a chat its messages."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        value = " / ".join(f"{message.get('role')}: {message_text(message)}" for message in value)
        return value if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]} ..."
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."
