"""Fingerprints as marl 0.1 wrote them: 64 samples of up to 24 matrices. Certificates and run folders still hold them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from marl_core.artifacts.architecture import is_in_a_layer, plain_name
from marl_core.bank.identity.fingerprint import SAMPLES_PER_TENSOR, Difference, Fingerprint, samples_of

RELATIVE_STEP = 2.0**-7
"""Twice the spacing of bfloat16 relative to the number: a cast base still matched."""
ALLOWED_SHARE = 0.05


def first_version(fingerprint: Fingerprint) -> dict[str, list[float]]:
    """What marl 0.1 would have recorded of the base that `found` is of."""
    matrices = {
        name: entry for name, entry in fingerprint["tensors"].items() if "shape" in entry and len(entry["shape"]) == 2
    }
    names = sorted(filter(is_in_a_layer, matrices)) or sorted(matrices)
    chosen = names[:: max(1, len(names) // 24)][:24]
    return {name: [round(value, 8) for value in samples_of(matrices[name]).tolist()] for name in chosen}


def difference_from_first(mine: Fingerprint, recorded: Mapping[str, Sequence[float]]) -> Difference:
    """What differs from a record of the first version, as far as that can tell."""
    here = {plain_name(name, mine["prefix"]): entry for name, entry in mine["tensors"].items() if "shape" in entry}
    pairs = {
        name: list(zip(samples_of(here[plain]).tolist()[:SAMPLES_PER_TENSOR], samples, strict=False))
        for name, samples in recorded.items()
        if (plain := plain_name(name, mine["prefix"])) in here
    }
    off = {
        name: sum(not math.isclose(a, b, rel_tol=RELATIVE_STEP, abs_tol=1e-6) for a, b in rows)
        for name, rows in pairs.items()
    }
    share = sum(off.values()) / max(sum(map(len, pairs.values())), 1)
    names = tuple(name for name, count in off.items() if count) if share > ALLOWED_SHARE else ()
    return Difference(names, share, len(pairs))


def short(fingerprint: Fingerprint | None) -> str | None:
    """A few characters that stand for the fingerprint in a run folder, its version first."""
    return f"v{fingerprint['version']}-{_hash(fingerprint)}" if fingerprint else None


def is_short_of(text: str | None, fingerprint: Fingerprint | None) -> bool:
    """Whether a run folder's `text`, of this version or the first, can be of this base; True where it can't be told."""
    if text is None or fingerprint is None or text == short(fingerprint):
        return text is None or fingerprint is not None
    if text.startswith(f"v{fingerprint['version']}-"):
        return False
    if "-" in text:  # of a version that this marl doesn't know
        return True
    plain = all(entry.get("digest") for entry in fingerprint["tensors"].values() if "shape" in entry)
    return not plain or text == _hash(first_version(fingerprint))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
