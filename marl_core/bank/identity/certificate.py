"""A certificate stored beside a reward adapter: which base, which token, which scores.

A reward adapter means something only on the weights it was trained on; PEFT can't tell another base of the same
shape. The certificate holds the base's fingerprint, the token position that is scored, and a few golden scores
computed by transformers' own classifier, so that a wrong base or a wrong reading shows at load.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marl_core.bank.identity.fingerprint import Difference, Fingerprint, difference, samples_of
from marl_core.bank.identity.fingerprint_v1 import difference_from_first
from marl_core.errors import DataError

FILE = "marl_certificate.json"


class Certificate(dict[str, Any]):
    """What stands in a certificate's file; a plain dict whose repr is a line, since its fingerprint is long."""

    def __init__(self, written: Mapping[str, Any], file: Path, named: str) -> None:
        """`file`: where it was written; `named`: whether its base is the one that the adapter names, in words."""
        super().__init__(written)
        self.file, self.named = file, named

    @property
    def golden_scores(self) -> list[float]:
        """The score of each golden text."""
        return [float(row["score"]) for row in self["golden"]]

    def __repr__(self) -> str:
        return (
            f"Certificate(file={str(self.file)!r}, base: {len(self['base']['tensors'])} tensors, "
            f"position={self['position']!r}, golden_scores={[round(score, 3) for score in self.golden_scores]})"
        )


def in_lines(certificate: Mapping[str, Any]) -> str:
    """JSON for people: a line for each key, for each golden text and for each of the base's tensors."""
    return _in_lines(certificate, 0, {"golden": 1, "base": 2}) + "\n"


def _in_lines(value: Any, depth: int, below: Mapping[str, int] | int) -> str:
    """`below`: how many levels under this one are broken into lines, the same for all keys or by key."""
    if below == 0 or not value or not isinstance(value, Mapping | list):
        return json.dumps(value)

    def of(key: str) -> int:
        return below - 1 if isinstance(below, int) else below.get(key, 0)

    entries = (
        [f"{json.dumps(key)}: {_in_lines(entry, depth + 1, of(key))}" for key, entry in value.items()]
        if isinstance(value, Mapping)
        else [_in_lines(entry, depth + 1, of("")) for entry in value]
    )
    opening, closing = "{}" if isinstance(value, Mapping) else "[]"
    indent = "\n" + " " * (depth + 1)
    return f"{opening}{indent}{f',{indent}'.join(entries)}{indent[:-1]}{closing}"


def _validate(certificate: Any) -> None:
    """ValueError unless it is what write_certificate writes."""
    if not isinstance(certificate, dict) or certificate.get("version") not in (1, 2):
        raise ValueError("it is no certificate of version 1 or 2")
    if certificate.get("position") not in ("last-non-pad", "last-attended") or not isinstance(
        certificate.get("pad_token_id"), int
    ):
        raise ValueError("position or pad_token_id is not what write_certificate writes")
    if not isinstance(certificate.get("verified", False), bool):
        raise ValueError("verified is neither true nor false")
    if not isinstance(certificate.get("base"), dict) or not isinstance(certificate.get("golden"), list):
        raise ValueError("base or golden is missing")
    (_validate_samples if certificate["version"] == 1 else _validate_fingerprint)(certificate["base"])
    for row in certificate["golden"]:
        ids, score = row["ids"], row["score"]
        if not (isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids) and math.isfinite(score)):
            raise ValueError("a golden row isn't token ids with a finite score")


def _validate_samples(base: dict[str, Any]) -> None:
    for samples in base.values():
        if not isinstance(samples, list) or not all(isinstance(value, int | float) for value in samples):
            raise ValueError("the base's samples are not numbers")


def _validate_fingerprint(base: dict[str, Any]) -> None:
    tensors = base["tensors"]
    if not isinstance(base["prefix"], str) or not isinstance(base["values"], str) or not isinstance(tensors, dict):
        raise ValueError("the base's fingerprint is not what write_certificate writes")
    if base["packed"] is not False or not all(isinstance(base[key], bool) for key in ("half", "computed")):
        raise ValueError("the base's fingerprint is not what write_certificate writes")
    for entry in tensors.values():
        plain = tensors[entry["same_as"]] if "same_as" in entry else entry
        samples_of(plain)
        if not all(isinstance(size, int) for size in plain["shape"]) or not isinstance(plain["dtype"], str):
            raise ValueError("a tensor's record has no shape or dtype")
        if not isinstance(plain["values"], str) or not isinstance(plain["digest"], str):
            raise ValueError("a tensor's record has no digest")


def difference_from_certificate(mine: Fingerprint, certificate: dict[str, Any]) -> Difference:
    """What differs between this base and the certified one."""
    recorded = certificate["base"]
    return difference_from_first(mine, recorded) if certificate["version"] == 1 else difference(mine, recorded)


def read_certificate(folder: str | Path) -> dict[str, Any] | None:
    """The certificate beside an adapter, None if there is none."""
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    try:
        certificate: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _validate(certificate)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{file} is damaged ({error}). Write it again with marl_core.write_certificate, or delete it to go without."
        ) from error
    return certificate
