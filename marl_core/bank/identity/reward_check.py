"""How a reward adapter's file wants to be read, and whether this base is the one it was trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from marl_core.artifacts.adapter_files import AdapterFiles
from marl_core.bank.identity.certificate import FILE, difference_from_certificate, read_certificate
from marl_core.bank.identity.fingerprint import Fingerprint, fingerprint
from marl_core.bank.identity.which_base import Origin, which_base
from marl_core.bank.reward_bank import RewardBank
from marl_core.bank.views import Position, ScoreView
from marl_core.errors import DataError

GOLDEN_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
"""Share of the golden scores' spread (at least 1). Measured on a 135M model in bfloat16: 0.02 to 0.15; a wrong position or
base is off by more than the spread itself, and other weights are seen by the fingerprint first."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Which token's hidden state the score is read from."""

    position: Position
    pad_id: int | None

    @classmethod
    def of(cls, files: AdapterFiles, tokenizer: Any) -> Reading:
        """From the certificate, else from the tokenizer beside the adapter, else from the base's tokenizer."""
        certificate = read_certificate(files.folder)
        if certificate is not None:
            return cls(certificate["position"], certificate["pad_token_id"])
        if not files.score_keys and files.value_head:  # LLaMA-Factory scores the last attended token, whatever it is
            return cls("last-attended", None)
        own = _pad_token(files.folder)
        return cls("last-non-pad", tokenizer.convert_tokens_to_ids(own) if own else tokenizer.pad_token_id)


def _pad_token(folder: Path) -> str | None:
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return None
    try:
        token = json.loads(file.read_text(encoding="utf-8")).get("pad_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{file} is damaged ({error}). Copy the tokenizer's files again.") from error
    return token.get("content") if isinstance(token, dict) else token


def check_reward(bank: RewardBank, view: ScoreView, files: AdapterFiles, asked_by: str) -> str:
    """A sentence on what was verified; DataError when the weights or the golden scores differ."""
    certificate, prints = read_certificate(files.folder), base_of(bank)
    answer = None
    if certificate is None or not certificate.get("verified"):  # older certificates don't say
        answer = which_base(files, _origin(bank), lambda: prints)
    certified = None
    if certificate is not None and prints is not None:
        certified = difference_from_certificate(prints, certificate)
    for difference in (certified, answer.difference if answer is not None else None):
        if difference is not None and difference.names:
            raise DataError(
                f"{asked_by}: the reward adapter {files.folder} was trained on other weights than this base "
                f"({difference}; it names {files.base_name!r}). Its rewards would mean nothing here. "
                "Use the base it was trained on, or train it on this one (for reference merged-base: on the merged model)."
            )
    if certificate is None and answer is not None:
        if answer.same is None:
            return f"can't verify that {files.folder} was trained on this base: no certificate, and {answer.evidence}"
        return f"trained on these weights ({answer.evidence})"
    assert certificate is not None
    golden = _check_golden(bank, view, certificate, files, asked_by)
    if certified is None or not certified.compared:
        why = (
            "this base's own weights aren't known"
            if certified is None
            else "its certificate names none of these tensors"
        )
        return f"can't verify that {files.folder} was trained on this base: {why}; {golden}"
    if answer is not None and not answer.same:
        return (
            f"the base that its certificate was written on; {golden}. Whether it was trained on this base could not be checked: "
            f"{answer.evidence}, so the certificate takes the base that its writer gave"
        )
    return f"trained on these weights; {golden}"


def check_base(bank: RewardBank, files: AdapterFiles, asked_by: str) -> str:
    """A sentence on whether an adapter's base is this one; DataError when it is another."""
    answer = which_base(files, _origin(bank), lambda: base_of(bank))
    if answer.difference is not None and answer.difference.names:
        raise DataError(
            f"{asked_by}: the adapter {files.folder} was trained on {files.base_name!r}, whose weights are not this base's "
            f"({answer.difference}). Use that base, or an adapter of this one."
        )
    if answer.same is None:
        return f"can't verify that {files.folder} was trained on this base: {answer.evidence}"
    return f"trained on these weights ({answer.evidence})"


def base_of(bank: RewardBank) -> Fingerprint | None:
    """The bank's fingerprint, made now for a base that was given as an object or written to; None where nothing is known."""
    plain = (
        not getattr(bank.base, "is_quantized", False) and bank.quantization.config is None and not bank.trunk.sharded
    )
    if plain and not bank.as_read:
        bank.fingerprint = fingerprint(bank.base, computed=True)
    return bank.fingerprint


def _origin(bank: RewardBank) -> Origin | None:
    return bank.origin if bank.as_read else None


def _check_golden(
    bank: RewardBank, view: ScoreView, certificate: dict[str, Any], files: AdapterFiles, asked_by: str
) -> str:
    rows = certificate["golden"]
    if not rows:
        return "no golden scores to compare"
    scores = [
        bank.score(
            view, torch.tensor([row["ids"]], device=bank.device), torch.ones(1, len(row["ids"]), device=bank.device)
        )
        for row in rows
    ]
    worst = max(abs(float(score) - row["score"]) for score, row in zip(scores, rows, strict=True))
    spread = max(1.0, max(row["score"] for row in rows) - min(row["score"] for row in rows))
    quantized = bank.quantization.config is not None
    allowed = GOLDEN_TOLERANCE.get(bank.trunk.precision, 0.25) * spread
    if not worst <= allowed and not quantized:  # NaN included
        raise DataError(
            f"{asked_by}: {files.folder} scores its own golden texts differently here (off by {worst:.3g}, allowed {allowed:.3g}). "
            f"The score position ({view.position}, pad {view.pad_id}) or the base differs from its training; "
            f"see {files.folder / FILE}."
        )
    return (
        f"{len(rows)} golden scores match within {worst:.2g}"
        if not quantized
        else f"golden scores differ by up to {worst:.2g} on this quantized base"
    )
