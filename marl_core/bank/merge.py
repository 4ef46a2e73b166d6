"""Merging an adapter into a base, in full precision, with the difference measured."""

from __future__ import annotations

import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor

from marl_core.bank import lora
from marl_core.bank.fingerprint import fingerprint
from marl_core.bank.which_base import which_base
from marl_core.config.adapter_files import AdapterFiles
from marl_core.errors import ConfigError, DataError, MarlWarning

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge changed: merged weights against base plus adapter, on probe tokens."""

    out: Path
    max_logit_difference: float
    mean_kl_nats: float
    seconds: float


def merge_into(
    base: PreTrainedModel,
    adapter: str | Path,
    asked_by: str = "adapter",
    *,
    revision: str | None = None,
    subfolder: str | None = None,
) -> PreTrainedModel:
    """The base with a LoRA adapter folded into its weights; the model object is the same one, changed.

    `revision` is that of a hub name, `subfolder` the folder inside `adapter` that holds it.
    Raises DataError when the adapter doesn't fit, ConfigError when the base is quantized: folding rounds there.
    """
    if getattr(base, "is_quantized", False) or base.dtype != torch.float32:
        raise ConfigError(
            f"{asked_by}: merging needs the full-precision (float32) base, this one is "
            f"{'quantized' if getattr(base, 'is_quantized', False) else base.dtype}. Merge first, quantize or cast afterwards."
        )
    unload: Any = attach(base, adapter, asked_by, revision, subfolder).merge_and_unload
    merged: PreTrainedModel = unload(safe_merge=True)
    return merged


def attach(
    base: PreTrainedModel,
    adapter: str | Path,
    asked_by: str,
    revision: str | None = None,
    subfolder: str | None = None,
) -> PeftModel:
    """The base with one adapter injected and active, every tensor in its place."""
    files = lora.find_adapter(adapter, asked_by, revision, subfolder)
    if files.score_keys:
        raise DataError(
            f"{asked_by}: {files.folder} is a reward adapter (it has a score head); merging it would lose the head."
        )
    linears = lora.linear_names(base, base.get_output_embeddings())
    config = lora.config_of(files, linears, asked_by)
    _check_base(base, files, asked_by)
    peft = PeftModel(base, config, adapter_name="merged")
    lora.load_weights(peft, "merged", files, asked_by)
    return peft.eval()


def _check_base(base: PreTrainedModel, files: AdapterFiles, asked_by: str) -> None:
    """DataError when the adapter names another base; a warning when that can't be told."""
    found = which_base(
        files, None, lambda: fingerprint(base, computed=True)
    )  # no origin: something may be merged into this one already
    if found.same is None:
        warnings.warn(
            f"{asked_by}: can't verify that {files.folder} was trained on this base: {found.words}.",
            MarlWarning,
            stacklevel=3,
        )
    elif found.difference is not None and not found.same:
        raise DataError(
            f"{asked_by}: the adapter {files.folder} was trained on {files.base_name!r}, whose weights are not this base's "
            f"({found.difference}). Use that base, or an adapter of this one."
        )


@torch.no_grad()
def merge_adapter(
    model: str, adapter: str, out: str | Path, dtype: str = "float32", revision: str | None = None
) -> MergeReport:
    """Merge `adapter` into `model` in float32, write a standalone model in `dtype` to `out`, measure the difference.

    The comparison is between base + adapter in float32 and what was written.
    """
    from marl_core.bank.base import load_base, load_tokenizer

    start, target = time.perf_counter(), Path(out)
    if target.is_file() or (target.exists() and any(target.iterdir())):
        raise DataError(f"--out {target} exists and isn't empty; give a new folder, nothing is overwritten.")
    tokenizer = load_tokenizer(model, revision=revision)
    peft = attach(load_base(model, revision=revision), adapter, "--adapter")
    probe = _probe(peft)
    before = peft(input_ids=probe).logits.float()
    merged = peft.merge_and_unload(safe_merge=True).to(getattr(torch, dtype))
    after = merged(input_ids=probe).logits.float()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
            whole = Path(temporary) / "model"
            merged.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
            whole.rename(target)  # over an empty folder, if there is one
    except OSError as error:
        raise DataError(f"--out {target} can't be written ({error}). Give another folder.") from error
    return MergeReport(
        target, float((before - after).abs().max()), float(_kl(before, after)), time.perf_counter() - start
    )


def _probe(model: PeftModel) -> Tensor:
    """8 rows of 32 tokens, the same for everybody."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocabulary, (8, 32), generator=torch.Generator().manual_seed(0))


def _kl(before: Tensor, after: Tensor) -> Tensor:
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()
