"""Writing a reward adapter's certificate, with transformers' own classifier as the judge of what is right."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from marl_core.artifacts.adapter_files import read_adapter
from marl_core.artifacts.hub import hub_read
from marl_core.artifacts.tokenizer import load_tokenizer
from marl_core.bank.identity.certificate import FILE
from marl_core.bank.identity.fingerprint import fingerprint
from marl_core.bank.identity.which_base import located
from marl_core.bank.inputs import plain
from marl_core.bank.read_through import is_half
from marl_core.errors import DataError


def write_certificate(
    folder: str | Path, base: str | Path, texts: Iterable[str], *, append_eos: bool = True
) -> dict[str, Any]:
    """Certify a reward adapter: score `texts` with transformers' classifier in float32 and record base and reading.

    `append_eos` scores each text with the EOS that TRL's RewardTrainer appends, unless its tokenizer has done so. Returns what
    was written. DataError for an adapter that can't be read or has no score head, for a base that transformers can't load as a
    classifier, and for texts that are none.
    """
    listed, folder = _texts(texts), Path(folder).expanduser()
    if not read_adapter(folder, "write_certificate").score_keys:
        raise DataError(
            f"write_certificate: {folder} holds no score head in its adapter file, so transformers' classifier would score with "
            "a random one. Certificates are for SEQ_CLS adapters as TRL's RewardTrainer saves them."
        )
    try:
        with hub_read(str(base), "write_certificate"):
            model = AutoModelForSequenceClassification.from_pretrained(
                str(base), num_labels=1, dtype=torch.float32, trust_remote_code=False
            )
    except (OSError, ValueError) as error:
        raise DataError(
            f"write_certificate: transformers can't load {str(base)!r} as a classifier ({' '.join(str(error).split())[:200]}). Give the "
            "folder or the hub name of the base that the adapter was trained on."
        ) from error
    tokenizer = load_tokenizer(str(folder) if (Path(folder) / "tokenizer_config.json").is_file() else str(base))
    model.config.pad_token_id = tokenizer.pad_token_id
    folder_of_base = located(str(base))
    prints = fingerprint(model, half=folder_of_base is not None and is_half(folder_of_base))
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
    certificate = {
        "version": 2,
        "base": prints,
        "pad_token_id": tokenizer.pad_token_id,
        "position": "last-non-pad",
        "append_eos": append_eos,
        "golden": golden,
    }
    (Path(folder) / FILE).write_text(json.dumps(certificate), encoding="utf-8")
    return certificate


def _texts(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise DataError("write_certificate: texts: give a list of texts, not one text.")
    listed = plain(texts)
    if not isinstance(listed, list):
        raise DataError(f"write_certificate: texts: give a list of texts, not a {type(texts).__name__}.")
    wrong = [number for number, text in enumerate(listed, start=1) if not isinstance(text, str)]
    if wrong:
        raise DataError(
            f"write_certificate: texts: text {wrong[0]} is a {type(listed[wrong[0] - 1]).__name__}; give texts alone."
        )
    return [str(text) for text in listed]
