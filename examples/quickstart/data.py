"""Movie-review snippets and human ratings -> three disjoint parts, preference pairs, prompts."""

import hashlib
import html
import json
import os
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

# `train` is for stages 1 and 2 (SFT, reward), `prompts` for PPO, `eval` is never trained on by any stage.
SHARES = {"train": 0.6, "prompts": 0.2, "eval": 0.2}
RATING_GAP = 1.5  # a pair is a preference when the mean human ratings (-4..4) are this far apart
OPENING_TOKENS = 4

Parts = dict[str, list["Review"]]


@dataclass(frozen=True, slots=True, order=True)
class Review:
    """One snippet of a movie review with its mean human rating in [-4, 4]."""

    id: int
    rating: float
    text: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Two reviews of which people rated `chosen` clearly higher."""

    chosen: Review
    rejected: Review


def read_reviews(file: Path) -> list[Review]:
    """Parse the tab-separated file; texts are lightly cleaned, later duplicates dropped."""
    unique: dict[str, Review] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        number, rating, text = line.split("\t", 2)
        review = Review(int(number), float(rating), _clean(text))
        unique.setdefault(review.text.lower(), review)
    return list(unique.values())


def split(reviews: Iterable[Review]) -> Parts:
    """Deal reviews into the parts of `SHARES` by a hash of their text: the same on every machine.

    Each part comes in the order of the hash, because the file has the good reviews first.
    """
    parts: Parts = {name: [] for name in SHARES}
    for position, review in sorted((_position(review), review) for review in reviews):
        place = sum(position >= edge for edge in accumulate(SHARES.values()))
        parts[list(SHARES)[min(place, len(SHARES) - 1)]].append(review)
    return parts


def preference_pairs(reviews: Sequence[Review], count: int, seed: int) -> list[Pair]:
    """Up to `count` different random pairs at least `RATING_GAP` apart, using the reviews about equally often."""
    rng = random.Random(seed)
    pairs: dict[tuple[int, int], Pair] = {}
    for _ in range(20):  # rounds over all reviews; about half of the neighbours are far enough apart
        for one, two in list(pairwise(rng.sample(reviews, len(reviews))))[::2]:
            low, high = sorted((one, two), key=lambda review: review.rating)
            if high.rating - low.rating >= RATING_GAP and len(pairs) < count:
                pairs[high.id, low.id] = Pair(high, low)
    return list(pairs.values())


def openings(reviews: Iterable[Review], tokenizer: Any, avoid: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The first `OPENING_TOKENS` tokens of each review as prompt rows, without duplicates.

    Kept are openings that end where a word ends and that encode back to the same tokens.
    """
    seen = set(avoid)
    rows = []
    for review in reviews:
        ids = tokenizer.encode(review.text, add_special_tokens=False)[:OPENING_TOKENS]
        prompt = tokenizer.decode(ids)
        rest = review.text[len(prompt) :]
        whole = review.text.startswith(prompt) and rest.startswith(" ") and len(rest.split()) >= 3
        if whole and prompt not in seen and tokenizer.encode(prompt, add_special_tokens=False) == ids:
            seen.add(prompt)
            rows.append({"prompt": prompt, "rating": round(review.rating, 3), "id": review.id})
    return rows


def write_prompts(folder: Path, parts: Parts, tokenizer: Any, heldout: int) -> tuple[int, int]:
    """Write `prompts.jsonl` (for PPO) and `heldout.jsonl` (for the before/after table); returns their lengths."""
    tested = openings(parts["eval"], tokenizer)[:heldout]
    trained = openings(parts["prompts"], tokenizer, avoid=[row["prompt"] for row in tested])
    write_jsonl(folder / "prompts.jsonl", trained)
    write_jsonl(folder / "heldout.jsonl", tested)
    return len(trained), len(tested)


def write_jsonl(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, written whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, file)


def _position(review: Review) -> float:
    """A number in [0, 1) that depends on nothing but the text."""
    digest = hashlib.sha256(review.text.lower().encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _clean(text: str) -> str:
    text = html.unescape(text).replace("''", '"')
    return re.sub(r"\s+", " ", text).strip()
