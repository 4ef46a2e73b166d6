"""Views: declarations of which weights to look through. The core opens them, one pass after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Position = Literal["last-attended", "last-non-pad"]


@dataclass(frozen=True, slots=True)
class View:
    """The shared base seen through one adapter; None is the bare base."""

    adapter: str | None


@dataclass(frozen=True, slots=True)
class ScoreView:
    """A scalar head on the hidden state of one token, seen through one adapter.

    `position` says which token: the last one of the sequence, or the last that isn't `pad_id`, which is what
    transformers' classifiers read (the two differ where pad is also the stop token).
    """

    view: View
    head: str
    position: Position = "last-attended"
    pad_id: int | None = None
