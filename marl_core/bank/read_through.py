"""The fingerprint of a model folder, read through transformers, so that its tensors have the names they have in memory.

Files name tensors otherwise than the loaded model does (GPT-2 without a prefix, an expert a tensor, an older layout):
transformers' own loading knows. Each tensor is recorded as it arrives and then dropped, so no second model is ever
in memory.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from marl_core.bank.base_tensors import base_places
from marl_core.bank.identity.fingerprint import Fingerprint, collected, record


class CannotRead(Exception):  # no fault: the caller says what can't be told
    """Why a folder's weights can't be compared, in a few words."""


def fingerprint_of_folder(folder: Path, *, dtype: str | None = None, digests: bool = True) -> Fingerprint:
    """Record of a causal language model's folder; CannotRead where that can't be had.

    `dtype` records what its numbers are after a cast to that dtype.

    A folder whose weights are quantized is recorded as its files are. `digests`: those too, which reads every byte.
    """
    if not any(folder.glob("*.safetensors")):
        raise CannotRead("has no safetensors weights")
    return _packed(folder) if is_packed(folder) else _read(folder, dtype, digests)


def is_packed(folder: Path) -> bool:
    """Whether the folder's weights are quantized already."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("quantization_config"))


def is_half(folder: Path) -> bool:
    """Whether most of the folder's bytes are float16."""
    sizes: Counter[str] = Counter()
    for file in folder.glob("*.safetensors"):
        try:
            with file.open("rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            for name, entry in header.items():
                if name != "__metadata__":
                    sizes[entry["dtype"]] += entry["data_offsets"][1] - entry["data_offsets"][0]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return bool(sizes) and sizes.most_common(1)[0][0] == "F16"


def _packed(folder: Path) -> Fingerprint:
    tensors: dict[str, Any] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(str(file), "pt") as stored:
                tensors |= {name: record(stored.get_tensor(name), digests=False) for name in stored.keys()}  # noqa: SIM118  # no mapping
    except Exception as error:
        raise CannotRead(f"can't be read ({type(error).__name__})") from error
    return collected(tensors, "", packed=True)


def _read(folder: Path, dtype: str | None, digests: bool) -> Fingerprint:
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        with _quiet(), torch.random.fork_rng(devices=[]), _recorded(dtype, digests) as records:
            model, report = load(
                str(folder),
                dtype="auto",  # a cast of all of it takes longer than reading it
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # whatever a folder of another kind makes of it
        raise CannotRead(f"can't be read as a causal language model ({type(error).__name__})") from error
    tensors: dict[str, Any] = {}
    names: dict[int, str] = {}
    for name, place in base_places(model).items():
        tensor = place.tensor
        if not place.kept or name in report["missing_keys"]:
            continue
        if id(tensor) in names:
            tensors[name] = {"same_as": names[id(tensor)]}
        elif id(tensor) in records:
            tensors[name] = records[id(tensor)][1]
            names[id(tensor)] = name
        elif not tensor.is_meta:  # a buffer
            tensors[name] = record(tensor, dtype=dtype, digests=digests)
    return collected(tensors, model.base_model_prefix, half=is_half(folder))


@contextmanager
def _recorded(dtype: str | None, digests: bool) -> Iterator[dict[int, tuple[Tensor, Any]]]:
    """Inside, each parameter that this thread puts into a module is recorded and replaced by an empty one.

    Gives, by the empty one's id, itself (so that the id stays its own) and the record.
    """
    records: dict[int, tuple[Tensor, Any]] = {}
    mine = threading.get_ident()

    def keep(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != mine:
            return None
        empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        empty._is_hf_initialized = True  # type: ignore[attr-defined]  # else transformers would fill it
        records[id(empty)] = (empty, record(parameter, dtype=dtype, digests=digests))
        return empty

    register: Any = register_module_parameter_registration_hook  # torch's stub forgets that a hook may give a parameter
    handle = register(keep)
    try:
        yield records
    finally:
        handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers says nothing and draws no bars: nobody asked for this model."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
