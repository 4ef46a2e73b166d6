"""What an adapter's files say, read without torch: its config, and each tensor's name, shape and dtype."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from marl_core.artifacts.kind_table import Kind, known_kind
from marl_core.artifacts.near_folder import near_folder
from marl_core.errors import DataError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
VALUE_HEAD_FILE = "value_head.safetensors"
VALUE_HEAD_PICKLE = "value_head.bin"
SCORE_KEYS = ("score", "classifier")
VALUE_HEAD_KEYS = ("v_head.summary.weight", "v_head.summary.bias")
PEFT_PREFIX = "base_model.model."
"""What PEFT puts before a name of the model in its files."""
SHARED_PARTS = "base_model"
"""What stands there before a tensor that all adapted layers share: VeRA's projections, TinyLoRA's vectors."""
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """A PEFT adapter on disk. `shapes` maps each tensor's name to its shape.

    `value_head` does the same for a value_head.safetensors beside it: LLaMA-Factory keeps the head of a reward adapter there.
    """

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    value_head: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        """The safetensors file."""
        return self.folder / WEIGHTS_FILE

    @property
    def base_name(self) -> str | None:
        """The base the adapter says it was trained on; None when it doesn't say."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def kind(self) -> Kind:
        """What is known of adapters of its type and options."""
        return known_kind(self.config.get("peft_type"), self.config)

    def part(self, name: str) -> re.Match[str] | None:
        """What a tensor's name says where it is a part of the adapter itself: `layer`, `part`, and the `rest` behind it, if any.

        None for whole weights that were saved with it, score heads among them.
        """
        return part_of(self.kind.parts, name)

    def adapted_layer(self, name: str) -> str | None:
        """The layer that a tensor adapts, by its name in the model; None where it adapts none: shared by all layers, or no part at all."""
        part = self.part(name)
        layer: str | None = part["layer"] if part else None
        return None if layer in (None, SHARED_PARTS) else layer.removeprefix(PEFT_PREFIX)

    @property
    def score_keys(self) -> list[str]:
        """Names of the score head's tensors (weight, and bias if there is one)."""
        heads = [f"{PEFT_PREFIX}{head}." for head in SCORE_KEYS]
        trained = (key for key in self.shapes if self.part(key) is None and ".original_module." not in key)
        return [key for key in trained if any(key.startswith(head) for head in heads)]

    @property
    def pickled_head(self) -> str:
        """A sentence on a value head that lies beside it as a pickle; empty when there is none."""
        pickle = self.folder / VALUE_HEAD_PICKLE
        if not pickle.is_file():
            return ""
        return f" {pickle} is a pickle, which marl never opens: save it again as {VALUE_HEAD_FILE}."

    @property
    def reward_head(self) -> tuple[Path, dict[str, tuple[int, ...]]]:
        """The file with the head of a reward adapter, and the head's tensors in it; none when there is no head."""
        score_head = {key: self.shapes[key] for key in self.score_keys}
        if score_head or not self.value_head:
            return self.weights, score_head
        head = {key: self.value_head[key] for key in VALUE_HEAD_KEYS if key in self.value_head}
        return self.folder / VALUE_HEAD_FILE, head


def part_of(parts: str, name: str) -> re.Match[str] | None:
    """A tensor's name as that of a part of an adapter whose parts begin with `parts`; None for other names."""
    return _own_part(parts).match(name)


@cache
def _own_part(parts: str) -> re.Pattern[str]:
    return re.compile(rf"^(?:(?P<layer>.+?)\.)?(?P<part>{re.escape(parts)}[^.]*)(?:\.(?P<rest>.+))?$")


def read_adapter(folder: str | Path, asked_by: str) -> AdapterFiles:
    """Read config and tensor names of a PEFT adapter folder.

    Raises DataError with `asked_by` (e.g. "reference.adapter") when files are missing, damaged or pickled.
    """
    path = Path(os.path.expanduser(folder))
    if not os.path.isdir(path):  # false for any odd name, where Path.is_dir raises
        near = near_folder(str(folder))
        hint = f"Did you mean {near!r}?" if near else f"Give the folder that holds {CONFIG_FILE}."
        raise DataError(f"{asked_by}: there is no adapter folder {str(folder)!r}. {hint}")
    if not (path / CONFIG_FILE).is_file():
        subfolders = sorted(child.name for child in path.iterdir() if (child / CONFIG_FILE).is_file())
        whole = (path / "config.json").is_file()
        trained = trained_policies(path)
        hint = (
            f"Did you mean {path / subfolders[0]}?"
            if subfolders
            else f"It is the folder of a run: give {trained[0]}."
            if trained
            else "It is a whole model: give the folder of an adapter that was trained on it."
            if whole
            else "Save it with PEFT's save_pretrained."
        )
        raise DataError(f"{asked_by}: {path} holds no {CONFIG_FILE}, so it isn't a PEFT adapter. {hint}")
    if not (path / WEIGHTS_FILE).is_file():
        if (path / PICKLE_FILE).is_file():
            raise DataError(
                f"{asked_by}: {path / PICKLE_FILE} is a pickle, which can run code when read; marl never opens one. "
                "Load it where you trust it and save it again with safe_serialization=True."
            )
        raise DataError(f"{asked_by}: {path} has a config but no {WEIGHTS_FILE}. Copy the whole adapter folder.")
    config = _read_config(path / CONFIG_FILE, asked_by)
    head = path / VALUE_HEAD_FILE
    head_shapes = read_shapes(head, asked_by) if head.is_file() else {}
    return AdapterFiles(path, config, read_shapes(path / WEIGHTS_FILE, asked_by), head_shapes)


def trained_policies(folder: Path) -> list[Path]:
    """The adapters that a run has written into its folder: the final one first, then those of its checkpoints, the newest first."""
    checkpoints = sorted(folder.glob("checkpoints/step-*/policy"), reverse=True)
    return [path for path in (folder / "final" / "policy", *checkpoints) if (path / CONFIG_FILE).is_file()]


def _read_config(file: Path, asked_by: str) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(
            f"{asked_by}: {file} is not valid JSON ({error}). Restore it from where the adapter was saved."
        ) from error
    if not isinstance(config, dict):
        raise DataError(f"{asked_by}: {file} holds a {type(config).__name__}, not a PEFT config.")
    return config


def read_shapes(file: Path, asked_by: str) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a safetensors file, from its header alone; DataError when it is damaged."""
    return {name: tuple(entry["shape"]) for name, entry in _read_header(file, asked_by)[0].items()}


def unpacked_shapes(file: Path, asked_by: str) -> dict[str, tuple[int, ...]]:
    """As read_shapes, but of bitsandbytes' 4-bit weights the shape they stand for, without the tensors that belong to the packing.

    bitsandbytes writes that shape as JSON into a small tensor beside each packed weight.
    """
    header, start = _read_header(file, asked_by)
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    for state in [name for name in header if _QUANT_STATE in name]:
        weight = state.partition(_QUANT_STATE)[0]
        first, last = header[state]["data_offsets"]
        with file.open("rb") as stream:
            stream.seek(start + first)
            raw = stream.read(last - first)
        try:
            shapes[weight] = tuple(int(size) for size in json.loads(raw)["shape"])
        except (ValueError, KeyError, TypeError):
            continue  # another way of packing: the packed shape is what is known
        for name in [name for name in shapes if name.startswith(f"{weight}.")]:
            del shapes[name]
    return shapes


_QUANT_STATE = ".quant_state.bitsandbytes__"


def _read_header(file: Path, asked_by: str) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and where its data starts."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"its header claims {length} bytes, the file has {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it should have {8 + length + end} bytes and has {size}: truncated or damaged")
        if not all(isinstance(size, int) for entry in header.values() for size in entry["shape"]):
            raise ValueError("a tensor's shape isn't a list of numbers")
        return header, 8 + length
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{asked_by}: {file} is not a whole safetensors file: {error}. Copy or save it again."
        ) from error
