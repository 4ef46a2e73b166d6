"""Which base is this? A fingerprint of weights, and a certificate stored beside a reward adapter.

A reward adapter means something only on the weights it was trained on; PEFT can't tell another base of the same
shape. The certificate holds samples of the base's weights, the token position that is scored, and a few golden
scores computed by transformers' own classifier, so that a wrong base or a wrong reading shows at load.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from marl_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "marl_certificate.json"
SAMPLES = 64
BF16_STEP = 2.0**-7
"""Twice the spacing of bfloat16 relative to the number: a cast base still matches."""
ALLOWED_SHARE = 0.05


def _chosen(names: Sequence[str]) -> list[str]:
    """Up to 24 two-dimensional layer weights, spread over the depth."""
    layers = sorted(name for name in names if ".layers." in name or ".h." in name or ".blocks." in name) or sorted(
        names
    )
    step = max(1, len(layers) // 24)
    return layers[::step][:24]


def _sample(tensor: Tensor) -> list[float]:
    flat = tensor.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), device=flat.device).long()
    return [round(value, 8) for value in flat[places].float().tolist()]


def fingerprint(base: PreTrainedModel) -> dict[str, list[float]]:
    """Samples of the weights of an unquantized base, by tensor name."""
    weights = {name: p for name, p in base.named_parameters() if p.dim() == 2 and "lora_" not in name}
    plain = {name.replace(".base_layer", ""): p for name, p in weights.items()}
    return {name: _sample(plain[name]) for name in _chosen(list(plain))}


def fingerprint_of_files(folder: str | Path) -> dict[str, list[float]] | None:
    """The same from a local model folder, without loading the model; None for a hub name."""
    files = sorted(Path(os.path.expanduser(folder)).glob("*.safetensors"))
    if not files:
        return None
    where: dict[str, Path] = {}
    for file in files:
        with safe_open(str(file), "pt") as tensors:
            where |= {name: file for name in tensors.keys() if len(tensors.get_slice(name).get_shape()) == 2}  # noqa: SIM118  # no mapping
    samples = {}
    for name in _chosen(list(where)):
        with safe_open(str(where[name]), "pt") as tensors:
            samples[name] = _sample(tensors.get_tensor(name))
    return samples


def differing_share(mine: Mapping[str, Sequence[float]], recorded: Mapping[str, Sequence[float]]) -> float:
    """Share of sampled weights that differ by more than a bfloat16 cast explains; 1 when nothing can be compared."""
    pairs = [(a, b) for name in recorded if name in mine for a, b in zip(mine[name], recorded[name], strict=False)]
    if not pairs:
        return 1.0
    return sum(not math.isclose(a, b, rel_tol=BF16_STEP, abs_tol=1e-6) for a, b in pairs) / len(pairs)


def same_base(mine: Mapping[str, Sequence[float]], recorded: Mapping[str, Sequence[float]]) -> bool:
    """Whether two fingerprints are of the same weights, a cast to bfloat16 allowed."""
    return differing_share(mine, recorded) <= ALLOWED_SHARE


def _validate(found: Any) -> None:
    """ValueError unless it is what write_certificate writes."""
    if not isinstance(found, dict) or found.get("version") != 1:
        raise ValueError("it is no certificate of version 1")
    if found.get("position") not in ("last-non-pad", "last-attended") or not isinstance(found.get("pad_token_id"), int):
        raise ValueError("position or pad_token_id is not what write_certificate writes")
    if not isinstance(found.get("base"), dict) or not isinstance(found.get("golden"), list):
        raise ValueError("base or golden is missing")
    for row in found["golden"]:
        ids, score = row["ids"], row["score"]
        if not (isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids) and math.isfinite(score)):
            raise ValueError("a golden row isn't token ids with a finite score")


def read_certificate(folder: str | Path) -> dict[str, Any] | None:
    """The certificate beside an adapter, None if there is none."""
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _validate(found)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{file} is damaged ({error}). Write it again with marl_core.write_certificate, or delete it to go without."
        ) from error
    return found
