"""Writing a reward adapter's certificate, with transformers' own classifier as the judge of what is right."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from marl_core.artifacts.adapter_files import AdapterFiles, read_adapter
from marl_core.artifacts.hub import hub_read
from marl_core.artifacts.tokenizer import load_tokenizer
from marl_core.bank.adapters import AdapterBank
from marl_core.bank.identity import reward_adapter
from marl_core.bank.identity.certificate import FILE, Certificate, in_lines
from marl_core.bank.identity.fingerprint import Fingerprint, fingerprint
from marl_core.bank.identity.which_base import Answer, Origin, which_base
from marl_core.bank.inputs import plain
from marl_core.bank.read_through import is_half
from marl_core.errors import DataError

LOAD_REPORT = "transformers.modeling_utils"
"""The logger by which transformers says that a classifier's head is new: true of every causal model, and the adapter brings its own."""


def write_certificate(
    folder: str | Path,
    base: str | Path,
    texts: Iterable[str],
    *,
    append_eos: bool = True,
    revision: str | None = None,
) -> Certificate:
    """Certify a reward adapter: score `texts` with transformers' classifier in float32 and record base and reading.

    `append_eos` scores each text with the EOS that TRL's RewardTrainer appends, unless its tokenizer has done so; `revision` is
    the base's on the hub. Returns what was written. DataError for an adapter that can't be read or has no score head, for a base
    that transformers can't load as a classifier, for one that isn't the base that the adapter names, where that is on this machine,
    and for texts that are none.
    """
    return _written(folder, base, texts, append_eos, revision, "write_certificate")


def certified(
    folder: str | Path, base: str, texts: Iterable[str], *, append_eos: bool, revision: str | None, dtype: str
) -> tuple[Certificate, str]:
    """As `write_certificate`, then read as a run with that `dtype` reads it; what was found, in a sentence.

    When the adapter can't be read so, or scores otherwise, DataError and the file that was there before, or none.
    """
    asked_by = "certify"
    file = Path(folder).expanduser() / FILE
    before = file.read_bytes() if file.is_file() else None
    certificate = _written(folder, base, texts, append_eos, revision, asked_by)
    try:
        bank = AdapterBank.from_pretrained(base, dtype=dtype, revision=revision)
        reward_adapter.load(bank, folder, None, None, asked_by)
        return certificate, "; ".join(bank.reward_checks.values())
    except BaseException:
        if before is None:
            file.unlink()
        else:
            file.write_bytes(before)
        raise


def _written(
    folder: str | Path, base: str | Path, texts: Iterable[str], append_eos: bool, revision: str | None, asked_by: str
) -> Certificate:
    listed, folder = _texts(texts, asked_by), Path(folder).expanduser()
    files = read_adapter(folder, asked_by)
    if not files.score_keys:
        raise DataError(
            f"{asked_by}: {folder} holds no score head in its adapter file, so transformers' classifier would score with "
            "a random one. Certificates are for SEQ_CLS adapters as TRL's RewardTrainer saves them."
        )
    try:
        with hub_read(str(base), asked_by, revision), _without_load_report():
            model = AutoModelForSequenceClassification.from_pretrained(
                os.path.expanduser(base), num_labels=1, dtype=torch.float32, trust_remote_code=False, revision=revision
            )
    except (OSError, ValueError) as error:
        raise DataError(
            f"{asked_by}: transformers can't load {str(base)!r} as a classifier ({' '.join(str(error).split())[:200]}). Give the "
            "folder or the hub name of the base that the adapter was trained on."
        ) from error
    own_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(folder)) if own_tokenizer else load_tokenizer(str(base), revision=revision)
    model.config.pad_token_id = tokenizer.pad_token_id
    origin = Origin.of(str(base), revision)
    prints = fingerprint(model, half=origin.folder is not None and is_half(origin.folder))
    answer = _compared_with_named(files, origin, prints, asked_by)
    model = PeftModel.from_pretrained(model, str(folder)).eval()
    golden = []
    eos = tokenizer.eos_token_id
    for text in listed:
        ids = list(tokenizer(text).input_ids)
        if append_eos and eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        with torch.no_grad():
            score = model(input_ids=torch.tensor([ids])).logits.item()
        golden.append({"ids": ids, "score": score})
    certificate = Certificate(
        {
            "version": 2,
            "verified": answer.same is True,
            "pad_token_id": tokenizer.pad_token_id,
            "position": "last-non-pad",
            "append_eos": append_eos,
            "golden": golden,
            "base": prints,
        },
        folder / FILE,
        f"is what the adapter names ({answer.evidence})"
        if answer.same
        else f"can't be compared with {files.base_name!r}, which the adapter names: {answer.evidence}",
    )
    certificate.file.write_text(in_lines(certificate), encoding="utf-8")
    return certificate


def _compared_with_named(files: AdapterFiles, origin: Origin, prints: Fingerprint, asked_by: str) -> Answer:
    """Whether this is the base that the adapter names.

    DataError when that one is on this machine and has other weights: the certificate would bless the wrong one.
    """
    answer = which_base(files, origin, lambda: prints)
    difference = answer.difference
    if difference is not None and difference.names:
        raise DataError(
            f"{asked_by}: the reward adapter {files.folder} was trained on {files.base_name!r}, whose weights are not those of "
            f"{origin.source!r} ({difference}). Give the base that it was trained on."
        )
    return answer


@contextmanager
def _without_load_report() -> Iterator[None]:
    """A block in which transformers reports no head as missing; errors are still said."""
    logger = logging.getLogger(LOAD_REPORT)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _texts(texts: Iterable[str], asked_by: str) -> list[str]:
    if isinstance(texts, str):
        raise DataError(f"{asked_by}: texts: give a list of texts, not one text.")
    listed = plain(texts)
    if not isinstance(listed, list):
        raise DataError(f"{asked_by}: texts: give a list of texts, not a {type(texts).__name__}.")
    wrong = [number for number, text in enumerate(listed, start=1) if not isinstance(text, str)]
    if wrong:
        raise DataError(
            f"{asked_by}: texts: text {wrong[0]} is a {type(listed[wrong[0] - 1]).__name__}; give texts alone."
        )
    return [str(text) for text in listed]
