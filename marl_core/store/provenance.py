"""Where a run's numbers come from: packages, strategies, weights, data, seed, hardware."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from marl_core.artifacts.adapter_files import WEIGHTS_FILE
from marl_core.bank.adapters import AdapterBank
from marl_core.bank.identity.fingerprint import Fingerprint
from marl_core.bank.identity.fingerprint_v1 import is_short_of, short
from marl_core.config.redact import redacted
from marl_core.errors import OVERRIDE, DataError, in_words
from marl_core.plan.plan import Plan
from marl_core.store.files import sha256
from marl_core.store.input_files import Rows, data_inputs, judging_inputs, training_inputs

PACKAGES = ("marl-core", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "pydantic", "pluggy")


def provenance(
    plan: Plan, bank: AdapterBank, processes: int, rows: Rows | None, eval_rows: Rows | None
) -> dict[str, Any]:
    """Everything that is needed to tell whether two runs are comparable.

    `rows`, `eval_rows`: the data of the training and held-out prompts, as they were read.
    """
    config, hooks = plan.config, plan.hooks
    record: dict[str, Any] = {
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "strategies": [hooks.origin(strategy) for strategy in hooks.strategies],
        "seed": config.run.seed,
        "base": {
            "source": bank.source,
            "prepared_by": bank.prepared,
            "fingerprint": short(bank.fingerprint),
        },
        "data": data_inputs(config.data.prompts, rows) if config.data else {},
        "files": training_inputs(plan),
        "eval_files": judging_inputs(plan, eval_rows),
        "adapters": {name: sha256(path / WEIGHTS_FILE) for name, path in bank.paths.items()},
        "hardware": {
            "machine": platform.machine(),
            "processor": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "processes": processes,
            "device": str(bank.device),
            "gpu": torch.cuda.get_device_name() if bank.device.type == "cuda" else None,
        },
        "python": platform.python_version(),
    }
    return {**record, "base": redacted(record["base"])}


def changes(
    was: Mapping[str, Any], now: Mapping[str, Any], fingerprint: Fingerprint | None
) -> tuple[list[str], list[str]]:
    """What a resumed run reads that isn't what it was at the start: what decides a step, and what only evaluations read.

    What an older version didn't record can't be compared, and counts as unchanged.
    """
    serious = [
        f"{kind} {name}"
        for key, kind in (("data", "data"), ("files", "file"), ("adapters", "adapter"))
        for name in _changed(was, now, key)
    ]
    serious += [] if is_short_of(was["base"]["fingerprint"], fingerprint) else ["the base's weights"]
    return serious, _changed(was, now, "eval_files")


def _changed(was: Mapping[str, Any], now: Mapping[str, Any], key: str) -> list[str]:
    before = was.get(key, {})
    return [name for name in before if now[key].get(name) != before[name]] if isinstance(before, Mapping) else []


def recorded_base(folder: Path, asked_by: str) -> Mapping[str, Any]:
    """What a run folder says of its base: `source`, `prepared_by` and `fingerprint`. DataError naming `asked_by` where it says nothing."""
    file = folder / "provenance.json"
    try:
        base: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))["base"]
        if not isinstance(base["prepared_by"], str):
            raise TypeError("base.prepared_by is no text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{asked_by}: {file} can't be read ({error!r}), so it isn't known what the run's base was. Restore it."
        ) from error
    return base


def require_base(recorded: Mapping[str, Any], fingerprint: Fingerprint | None, asked_by: str) -> None:
    """DataError when the base isn't the one that `recorded_base` told of; where that can't be told, nothing."""
    if not is_short_of(recorded.get("fingerprint"), fingerprint):
        raise DataError(
            f"{asked_by}: the weights of {recorded.get('source')!r} are not those that the run was made on, so its policy would mean "
            "nothing on them. Put back what was there."
        )


def read_provenance(file: Path) -> dict[str, Any]:
    """What a run was started with; DataError when the file isn't what `provenance` gives."""
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        complete = isinstance(record["data"], dict) and isinstance(record["adapters"], dict)
        if not complete or "fingerprint" not in record["base"] or "threads" not in record["hardware"]:
            raise ValueError("a part is missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"resume: {file} is damaged ({error}), so it can't be told whether data, adapters and base are those of the start. "
            f"Restore it, or resume with {in_words(*OVERRIDE)}."
        ) from error
    return record


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
