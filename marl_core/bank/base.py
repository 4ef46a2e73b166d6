"""Loading the one base: in full precision first where something is merged into it, quantized or cast afterwards."""

from __future__ import annotations

import gc
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from marl_core.artifacts.hub import hub_read
from marl_core.artifacts.model_files import read_model, require_pinned_code
from marl_core.artifacts.tokenizer import load_tokenizer
from marl_core.bank.identity.fingerprint import Fingerprint, fingerprint
from marl_core.bank.identity.which_base import Origin, located
from marl_core.bank.out_of_memory import raise_if_out_of_memory
from marl_core.bank.read_through import CannotRead, fingerprint_of_folder, is_half
from marl_core.bank.shard import shard_base
from marl_core.errors import ConfigError, DataError, MarlError
from marl_core.logs import LOADING, logger
from marl_core.plan.stored_weights import quantization_of_folder, quantized_already
from marl_core.registry.strategy import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prepare = Callable[["PreTrainedModel"], "PreTrainedModel | None"]


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A base as an AdapterBank takes it over."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    """What was asked for: a folder or a hub name."""
    quantization: Quantization
    sharded: bool
    origin: Origin | None
    """Where it was read from; None for one that was prepared."""
    fingerprint: Fingerprint | None


def load_for_bank(
    path: str,
    *,
    dtype: str = "float32",
    tokenizer: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
    prepare: Prepare | None = None,
    shard: bool = False,
) -> LoadedBase:
    """Load model and tokenizer; `shard` the model's layers over the processes of this run.

    `prepare` gets the float32 base and may return a changed one (an adapter merged in): only then is the result
    quantized or cast to `dtype`, because merging into a quantized base is lossy.
    """
    quantization = quantization or Quantization()
    source, path = path, os.path.expanduser(path)
    if quantization.config is None:
        quantization = quantization_of_folder(path, revision, dtype) or quantization
    if trust_remote_code:
        require_pinned_code(path, revision, tokenizer)
    target = _target(device, quantization, shard)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    if attention:
        options["attn_implementation"] = attention
    loaded_tokenizer = load_tokenizer(
        tokenizer or path,
        trust_remote_code=trust_remote_code,
        revision=None if tokenizer else revision,
        asked_by="model.tokenizer" if tokenizer else "model.path",
    )
    first = "cpu" if shard else target
    started = time.perf_counter()
    logger(LOADING).info("model %s%s", source, _stored_size(path, revision))
    prints: Fingerprint | None
    if prepare is not None:
        base, prints = _load_prepared(path, prepare, dtype, first, quantization, options)
    else:
        base = _load(path, dtype, first, quantization, options)
        prints = _print(base, quantization, located(path, revision))
    if quantization.after_load is not None:
        quantization.after_load(base)
    _check_vocabulary(base, loaded_tokenizer, path)
    base = shard_base(base, target) if shard else base
    origin = Origin.of(path, revision) if prepare is None else None
    logger(LOADING).info(
        "%s weights as %s on %s, %.1f s",
        f"{sum(p.numel() for p in base.parameters()):,}",
        "packed integers" if quantization.config is not None else dtype,
        target,
        time.perf_counter() - started,
    )
    return LoadedBase(base, loaded_tokenizer, source, quantization, shard, origin, prints)


def _stored_size(path: str, revision: str | None) -> str:
    """How big the model's files are, for a line of the log; empty where they aren't here yet, or can't be read."""
    try:
        files = read_model(path, revision)
        size = files.stored_bytes() if files is not None else 0
    except (MarlError, OSError, ValueError, KeyError, TypeError, AttributeError):  # whoever loads it says so
        return ""
    return f": {size / 2**20:,.1f} MiB" if size else ""


def _print(base: PreTrainedModel, quantization: Quantization, folder: Path | None) -> Fingerprint | None:
    """The fingerprint of a base as it was read; of its files where the weights in memory are packed."""
    if quantization.config is None and not getattr(base, "is_quantized", False):
        return fingerprint(base, half=folder is not None and is_half(folder))
    try:  # samples are enough: a digest could only be compared with that of other files
        return fingerprint_of_folder(folder, digests=False) if folder is not None else None
    except CannotRead:
        return None


def _target(device: str, quantization: Quantization, shard: bool) -> str:
    """The device the base goes to; ConfigError when it can't."""
    target = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if target.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "run.device: cuda was asked for, but torch sees no CUDA device here. Use device: auto or cpu."
        )
    if shard and quantization.config is not None:
        raise ConfigError(
            "model.shard: a quantized base can't be sharded, its packed weights are no plain tensors. "
            "Use quantization: none, or model.shard: none."
        )
    return target


def load_base(
    path: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    asked_by: str = "model.path",
) -> PreTrainedModel:
    """The plain model, without a bank. `asked_by`: the key or option that names it, for messages."""
    options = {"trust_remote_code": False, "revision": revision}
    return _load(os.path.expanduser(path), dtype, device, None, options, asked_by)


def _load(
    path: str,
    dtype: str,
    device: str,
    quantization: Quantization | None,
    options: dict[str, Any],
    asked_by: str = "model.path",
) -> PreTrainedModel:
    if quantization is not None and quantization.config is not None:
        told = {} if quantized_already(path, options.get("revision")) else {"quantization_config": quantization.config}
        options = {**options, **told, "device_map": {"": device}}
    base: Any
    try:
        load: Any = AutoModelForCausalLM.from_pretrained
        with (
            hub_read(path, asked_by, options.get("revision")),
            warnings.catch_warnings(),
        ):  # a folder's own quantization is asked for in its own words
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            base, report = load(
                path, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, **options
            )
    except (OSError, ValueError, ImportError, RuntimeError, TypeError) as error:
        raise_if_out_of_memory(error)
        raise DataError(
            f"{asked_by}: {path!r} could not be loaded as a causal language model: {_first_line(error)} "
            "Give a folder with config.json and safetensors weights, or a hub name that this machine can reach."
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise DataError(
            f"{asked_by}: {path!r} lacks {len(missing)} weights (first: {missing[:3]}); they would be random. "
            "Its config.json and its weights don't belong together, a file is missing (copy the whole folder again), or transformers "
            "has no causal language model for weights of this kind."
        )
    model: PreTrainedModel = base if "device_map" in options else base.to(device)
    return model


def _load_prepared(
    path: str, prepare: Prepare, dtype: str, device: str, quantization: Quantization, options: dict[str, Any]
) -> tuple[PreTrainedModel, Fingerprint]:
    """The base prepared in float32, then cast, or written to a temporary folder and loaded quantized; its fingerprint."""
    if quantization.config is None:
        base, prints = _prepared(path, prepare, options)
        cast: Any = base
        return cast.to(device=device, dtype=getattr(torch, dtype)), prints
    with tempfile.TemporaryDirectory(prefix="marl-merged-") as folder:
        prints = _write_prepared(path, prepare, options, folder)
        gc.collect()  # PEFT's wrapper and the base hold each other: the float32 weights must go before others come
        return _load(folder, dtype, device, quantization, {**options, "revision": None}), prints


def _prepared(path: str, prepare: Prepare, options: dict[str, Any]) -> tuple[PreTrainedModel, Fingerprint]:
    base = _load(path, "float32", "cpu", None, options)
    base = prepare(base) or base
    return base, fingerprint(base, computed=True)


def _write_prepared(path: str, prepare: Prepare, options: dict[str, Any], folder: str) -> Fingerprint:
    """Nothing of the base outlives the call."""
    base, prints = _prepared(path, prepare, options)
    base.save_pretrained(folder)
    return prints


def _check_vocabulary(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    embedding: Any = base.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    if len(tokenizer) > rows:
        first = tokenizer.convert_ids_to_tokens(rows)
        raise DataError(
            f"model: the tokenizer of {path!r} knows {len(tokenizer)} tokens, the embedding has {rows} rows; "
            f"the first token without one is {first!r}. Use the tokenizer this model was trained with."
        )


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
