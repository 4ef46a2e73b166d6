"""Which base is this? A record of every tensor of a base, and whether two records can be of the same weights.

A record holds a digest of all bytes and samples. Where both sides hold the same kind of numbers the digests decide,
so that a change of one number shows; where one was cast, samples do, as exactly as that cast allows.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from marl_core.artifacts.architecture import kind_and_depth, plain_name
from marl_core.bank.base_tensors import base_places
from marl_core.bank.identity.digest import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Fingerprint = dict[str, Any]
"""JSON-able: version, dtype, values, half, packed, computed, prefix, and `tensors`, a record by name."""

VERSION = 2
SAMPLES_PER_TENSOR = 64
SAMPLES_PER_EXPERT = 4
FLOAT16_STEP_NEAR_ZERO = 2.0**-24
"""The step of float16 near zero: what a cast through float16 may move a small number by."""
RELATIVE_STEP = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""One step of each dtype, relative to the number."""
SHARE_A_STEP_OFF = 0.25
"""Share of a tensor's samples that may be a step off: two casts in a row round 6 % of numbers otherwise than one."""
MERGE_NOISE = 1e-5
"""What rounding in a merge may change, relative to a tensor's largest sample: ten times float32's own."""
CHUNK_ELEMENTS = 2**24


def fingerprint(base: PreTrainedModel, *, half: bool = False, computed: bool = False) -> Fingerprint:
    """Record of an unquantized base. `half`: its numbers came out of a float16 file.

    `computed`: its numbers weren't just read (an adapter was merged in), so another machine may have rounded otherwise.
    """
    records: dict[int, dict[str, Any]] = {}
    tensors: dict[str, Any] = {}
    names: dict[int, str] = {}
    for name, place in base_places(base).items():
        if not place.kept:
            continue
        tensor = place.tensor
        if id(tensor) in records:  # tied
            tensors[name] = {"same_as": names[id(tensor)]}
            continue
        names[id(tensor)] = name
        tensors[name] = records[id(tensor)] = record(tensor)
    return collected(tensors, base.base_model_prefix, half=half, computed=computed)


@torch.no_grad()
def record(tensor: Tensor, *, dtype: str | None = None, digests: bool = True) -> dict[str, Any]:
    """Shape, dtype, the dtype that its numbers need, samples, and with `digests` the digest in that dtype.

    `dtype`: as if it had been cast to that dtype, which floating point numbers are.
    """
    to = getattr(torch, dtype) if dtype is not None and tensor.is_floating_point() else tensor.dtype
    flat = tensor.detach().reshape(-1)
    samples = flat[_places(tensor).to(flat.device)].to(to).float().cpu()
    values = getattr(torch, _needed(samples)) if to in (torch.float32, torch.bfloat16, torch.float16) else to
    return {
        "shape": list(tensor.shape),
        "dtype": _word(to),
        "values": _word(values),
        "digest": f"{int(_digest_as(flat, to, values)) & (2**64 - 1):016x}" if digests else None,
        "samples": base64.b64encode(samples.numpy().astype("<f4").tobytes()).decode("ascii"),
    }


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def collected(
    tensors: dict[str, Any], prefix: str, *, half: bool = False, packed: bool = False, computed: bool = False
) -> Fingerprint:
    """The fingerprint made of records by name."""
    sizes: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    for entry in tensors.values():
        if "shape" in entry:
            sizes[entry["values"]] += _elements(entry)
            stored[entry["dtype"]] += _elements(entry)
    return {
        "version": VERSION,
        "dtype": stored.most_common(1)[0][0] if stored else "float32",
        "values": sizes.most_common(1)[0][0] if sizes else "float32",
        "half": half or bool(stored and stored.most_common(1)[0][0] == "float16"),
        "packed": packed,
        "computed": computed,
        "prefix": prefix,
        "tensors": tensors,
    }


def samples_of(entry: Mapping[str, Any]) -> Tensor:
    """A record's samples, float32."""
    raw = bytearray(base64.b64decode(entry["samples"]))
    return torch.frombuffer(raw, dtype=torch.float32) if raw else torch.zeros(0)


def _places(tensor: Tensor) -> Tensor:
    count = max(SAMPLES_PER_TENSOR, SAMPLES_PER_EXPERT * tensor.shape[0]) if tensor.dim() > 2 else SAMPLES_PER_TENSOR
    last = tensor.numel() - 1
    return torch.linspace(0, last, min(count, tensor.numel())).long().clamp_(max=max(last, 0))


def _needed(samples: Tensor) -> str:
    """The narrowest dtype that holds these numbers as they are."""
    for dtype in ("bfloat16", "float16"):
        if torch.equal(samples.to(getattr(torch, dtype)).float(), samples):
            return dtype
    return "float32"


def _digest_as(flat: Tensor, dtype: torch.dtype, values: torch.dtype) -> Tensor:
    result = torch.zeros((), dtype=torch.int64, device=flat.device)
    for chunk in flat.split(CHUNK_ELEMENTS):  # a cast copies, so never the whole tensor at once
        result = result * 31 + digest(chunk.to(dtype).to(values))
    return result


def _elements(entry: Mapping[str, Any]) -> int:
    count = 1
    for size in entry["shape"]:
        count *= size
    return count


@dataclass(frozen=True, slots=True)
class Difference:
    """How two bases differ: names of tensors, the share of sampled weights, and how many tensors were compared."""

    names: tuple[str, ...]
    share: float
    compared: int

    def __str__(self) -> str:
        """Which kinds of weights differ, in which layers."""
        share = f"{self.share:.0%} of the sampled weights differ" if self.share >= 0.005 else "single weights differ"
        return f"{share}: {kinds(self.names)}"


def difference(mine: Fingerprint, recorded: Fingerprint) -> Difference:
    """What differs between two bases, a cast to another dtype allowed for."""
    twice = mine["half"] and mine["values"] == "bfloat16"  # through float16 and bfloat16, in this or the other order
    cast = mine["values"] != recorded["values"] or mine["half"] != recorded["half"] or twice
    noise = MERGE_NOISE if mine["computed"] or recorded["computed"] else 0.0
    here, there = _by_plain_name(mine), _by_plain_name(recorded)
    # an embedding with added rows can't be compared; where more has another shape, no adapter of it fits at all
    shared = [name for name in here if name in there and here[name]["shape"] == there[name]["shape"]]
    names, off, count = [], 0.0, 0
    for name in shared:
        a, b = here[name], there[name]
        differs, share = _differs(a, b, cast, noise)
        if differs:
            names.append(name)
            off += share * len(samples_of(a))
        count += len(samples_of(a))
    return Difference(tuple(names), off / max(count, 1), len(shared))


def _by_plain_name(prints: Fingerprint) -> dict[str, Any]:
    """Records by the name within the body: a classifier's body and a text model's inside a larger one are alike."""
    tensors = prints["tensors"]
    return {
        plain_name(name, prints["prefix"]): tensors[entry["same_as"]] if "same_as" in entry else entry
        for name, entry in tensors.items()
    }


def _differs(a: Mapping[str, Any], b: Mapping[str, Any], cast: bool, noise: float) -> tuple[bool, float]:
    """Whether two records are of other weights, and the share of their samples that differ."""
    one, other = samples_of(a), samples_of(b)
    if len(one) != len(other):
        return True, 1.0
    share = float((one != other).float().mean()) if len(one) else 0.0
    known = a["digest"] is not None and b["digest"] is not None
    if a["values"] == b["values"] and known and a["digest"] == b["digest"]:
        return False, 0.0
    if cast or noise or _narrowed(a, b) or _narrowed(b, a):
        return _differ_after_a_cast(one, other, {a["values"], b["values"]}, noise), share
    return (known or a["values"] != b["values"] or share > 0), share


def _narrowed(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether `a` is held in a dtype that can't hold the numbers of `b`."""
    return a["dtype"] in ("bfloat16", "float16") and b["values"] not in ("bfloat16", a["dtype"])


def _differ_after_a_cast(one: Tensor, other: Tensor, values: set[str], noise: float) -> bool:
    coarse = next((dtype for dtype in ("bfloat16", "float16") if dtype in values), "float32")
    to = getattr(torch, coarse)
    small = FLOAT16_STEP_NEAR_ZERO + noise * float(one.abs().max()) if len(one) else FLOAT16_STEP_NEAR_ZERO
    one, other = (part.to(to).float() if len(values) > 1 else part for part in (one, other))
    off = (one - other).abs()
    far = off > RELATIVE_STEP[coarse] * torch.maximum(one.abs(), other.abs()) + small
    return bool(far.any()) or float((off > small).float().mean()) > SHARE_A_STEP_OFF


def kinds(names: Iterable[str]) -> str:
    """Names of tensors as kinds of weights and their layers: `q_proj, o_proj of layers 0-23; embed_tokens`."""
    layers: dict[str, set[int]] = {}
    single: list[str] = []
    for name in names:
        kind, depth = kind_and_depth(name)
        if depth is None:
            single += [kind] if kind not in single else []
        else:
            layers.setdefault(kind, set()).add(depth)
    alike: dict[str, list[str]] = {}
    for kind, depths in layers.items():
        alike.setdefault(_ranges(sorted(depths)), []).append(kind)
    clauses = [
        f"{', '.join(same)} of layer{'s' if not where.isdigit() else ''} {where}" for where, same in alike.items()
    ]
    return "; ".join(clauses + ([", ".join(single)] if single else []))


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as 0-2, 5."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
