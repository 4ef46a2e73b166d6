"""Merging an adapter into a base, in full precision, with the difference measured."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from marl_core.artifacts.adapter_files import PEFT_PREFIX, AdapterFiles
from marl_core.artifacts.adapter_kinds import brings_tokens, refusals, saved_embeddings
from marl_core.artifacts.new_folder import require_new_folder
from marl_core.artifacts.tokenizer import load_tokenizer
from marl_core.bank import peft_adapters
from marl_core.bank.base import load_base
from marl_core.bank.identity.fingerprint import fingerprint
from marl_core.bank.identity.which_base import which_base
from marl_core.bank.mount import Tree
from marl_core.bank.out_of_memory import raise_if_out_of_memory
from marl_core.errors import ConfigError, DataError, in_words, warn
from marl_core.plan.adapter_checks import other_rows

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
    """The base with an adapter folded into its weights; the model object is the same one, changed.

    `revision` is that of a hub name, `subfolder` the folder inside `adapter` that holds it.
    Raises DataError when the adapter doesn't fit or is of a kind that PEFT can't merge, ConfigError when the base is quantized: folding
    rounds there.
    """
    return _merged(attach(base, adapter, asked_by, revision, subfolder), str(adapter), asked_by)


def _merged(peft: PeftModel, adapter: str, asked_by: str) -> PreTrainedModel:
    """PEFT's own merge, whatever the kind; DataError where it has no rule for it."""
    unload: Any = peft.merge_and_unload
    try:
        merged: PreTrainedModel = unload(safe_merge=True)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise_if_out_of_memory(error)
        raise DataError(
            f"{asked_by}: peft can't merge {adapter} into this base: {' '.join(str(error).split())[:300]} Keep the adapter beside "
            "the base instead (policy.from, or reference: peft-adapter), or train one of a kind that can be merged."
        ) from error
    return merged


def attach(
    base: PreTrainedModel,
    adapter: str | Path,
    asked_by: str,
    revision: str | None = None,
    subfolder: str | None = None,
    *,
    grow: bool = False,
) -> PeftModel:
    """The base with one adapter on it as plain peft puts it there, every tensor of the file in its place.

    `grow`: give the base the rows of the adapter's saved embeddings first, where it was trained with added tokens.
    """
    if getattr(base, "is_quantized", False) or base.dtype != torch.float32:
        raise ConfigError(
            f"{asked_by}: merging needs the full-precision (float32) base, this one is "
            f"{'quantized' if getattr(base, 'is_quantized', False) else base.dtype}. Merge first, quantize or cast afterwards."
        )
    files = peft_adapters.find_adapter(adapter, asked_by, revision, subfolder)
    wrong = [*refusals(files, "merged"), *([] if grow else other_rows(files, _rows(base)))]
    if wrong:
        raise DataError("\n".join(f"{asked_by}: {sentence}" for sentence in wrong))
    _check_base(base, files, asked_by)
    _make_room(base, files, asked_by)
    tree = Tree(base)
    try:
        config = PeftConfig.from_pretrained(str(files.folder))
        config.inference_mode = True
        peft = PeftModel(base, config)
        placed: Any = peft.load_adapter(str(files.folder), "default")
    except Exception as error:  # whatever an odd file makes of it
        tree.put_back()
        raise DataError(
            f"{asked_by}: peft can't put {files.folder} on this base ({type(error).__name__}: {' '.join(str(error).split())[:300]}). It "
            f"says it was trained on {files.base_name!r}: use that base, or another adapter."
        ) from error
    _refuse_shared(peft, files, asked_by)
    _require_biases(peft, files, asked_by)
    _all_in_place(_missing(peft, placed.missing_keys), placed.unexpected_keys, files, asked_by)
    return peft.eval()


def _check_base(base: PreTrainedModel, files: AdapterFiles, asked_by: str) -> None:
    """DataError when the adapter names another base; a warning when that can't be told."""
    answer = which_base(
        files, None, lambda: fingerprint(base, computed=True)
    )  # no origin: something may be merged into this one already
    if answer.same is None:
        warn(f"{asked_by}: can't verify that {files.folder} was trained on this base: {answer.evidence}.")
    elif answer.difference is not None and not answer.same:
        raise DataError(
            f"{asked_by}: the adapter {files.folder} was trained on {files.base_name!r}, whose weights are not this base's "
            f"({answer.difference}). Use that base, or an adapter of this one."
        )


def _rows(base: PreTrainedModel) -> dict[str, int]:
    layers = {id(layer): layer for layer in (base.get_input_embeddings(), base.get_output_embeddings()) if layer}
    named: list[tuple[str, Any]] = [(name, m) for name, m in base.named_modules() if id(m) in layers]
    return {f"{name}.weight": int(module.weight.shape[0]) for name, module in named}


def _make_room(base: PreTrainedModel, files: AdapterFiles, asked_by: str) -> None:
    """Rows for added tokens, and an output layer of its own where the adapter changes only one of two tied weights."""
    saved = saved_embeddings(files)
    rows = {shape[0] for shape in saved.values()}
    have = int(base.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    if len(rows) == 1 and rows != {have}:
        lacking = len(saved) == 1 and not base.config.get_text_config().tie_word_embeddings
        if lacking:
            raise DataError(
                f"{asked_by}: {files.folder} brings {next(iter(rows))} rows for {next(iter(saved))} alone, and this base has {have} for "
                "embedding and output layer each. Save the adapter with save_embedding_layers=True."
            )
        base.resize_token_embeddings(rows.pop(), mean_resizing=False)
    inner, outer = base.get_input_embeddings(), base.get_output_embeddings()
    adapted = {files.adapted_layer(key) for key in files.shapes} if files.kind.linear else set()
    ends: list[Any] = [module for name, module in base.named_modules() if name in adapted and module in (inner, outer)]
    tied: Any = outer
    if ends and inner is not outer and tied is not None and tied.weight is ends[0].weight:
        tied.weight = torch.nn.Parameter(tied.weight.detach().clone(), requires_grad=False)
        base.config.get_text_config().tie_word_embeddings = False


def _refuse_shared(peft: PeftModel, files: AdapterFiles, asked_by: str) -> None:
    """DataError where two adapted layers hold one weight: each has numbers of its own, and merged, both would change it.

    Single trained tokens are put in their rows' place, not added, and PEFT gives tied layers the same ones.
    """
    seen: dict[int, str] = {}
    for name, layer in peft.named_modules():
        if not isinstance(layer, BaseTunerLayer) or isinstance(layer, TrainableTokensLayer):
            continue
        weight = getattr(layer.get_base_layer(), "weight", None)
        if not isinstance(weight, Tensor):
            continue
        other = seen.setdefault(weight.data_ptr(), name)
        if other != name:
            one, two = (path.removeprefix(PEFT_PREFIX) for path in (other, name))
            raise DataError(
                f"{asked_by}: {files.folder} adapts {one} and {two}, which share one weight in this model: merged, both changes would be "
                "added to it. Keep the adapter beside the base instead (policy.from, or reference: peft-adapter), or train one that "
                "leaves such layers out."
            )


def _require_biases(peft: PeftModel, files: AdapterFiles, asked_by: str) -> None:
    """DataError for a kind that is merged into biases, where an adapted layer of this base has none."""
    if files.kind.merge != "bias":
        return
    layers = ((name, layer) for name, layer in peft.named_modules() if isinstance(layer, BaseTunerLayer))
    bare = [name for name, layer in layers if getattr(layer.get_base_layer(), "bias", None) is None]
    if bare:
        raise DataError(
            f"{asked_by}: {files.folder} is {files.kind.title}: it adds to biases, and {len(bare)} layers that it adapts have none "
            f"(first: {bare[0].removeprefix(PEFT_PREFIX)}), so it can't be merged. Keep the adapter beside the base instead "
            "(policy.from, or reference: peft-adapter)."
        )


def _missing(peft: PeftModel, keys: Sequence[str]) -> list[str]:
    """Those that didn't come under another name either: PEFT names tensors that layers share (VB-LoRA's vectors) once for each layer."""
    tensors = peft.state_dict(keep_vars=True)
    arrived = {id(tensor) for key, tensor in tensors.items() if key not in set(keys)}
    return [key for key in keys if id(tensors.get(key)) not in arrived]


def _all_in_place(missing: Sequence[str], extra: Sequence[str], files: AdapterFiles, asked_by: str) -> None:
    """DataError unless each tensor of the file has its place in the model, and each of the adapter's tensors came from the file."""
    if missing or extra:
        raise DataError(
            f"{asked_by}: the adapter {files.folder} doesn't fit this base: {len(missing)} tensors are missing (first: "
            f"{list(missing[:3])}), {len(extra)} have no place in this base (first: {list(extra[:3])}). It says it was trained on "
            f"{files.base_name!r}: use that base, or another adapter."
        )
    bad = [name for name, tensor in load_file(str(files.weights)).items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise DataError(
            f"{asked_by}: {files.weights} holds NaN or infinite weights (first: {bad[0]}). Save the adapter again."
        )


@torch.no_grad()
def merge_adapter(
    model: str, adapter: str, out: str | Path, dtype: str = "float32", revision: str | None = None
) -> MergeReport:
    """Merge `adapter` into `model` in float32, write a standalone model in `dtype` to `out`, measure the difference.

    The comparison is between base + adapter in float32 and what was written. `dtype`: float32, bfloat16 or float16; `revision` is the
    base's. DataError when model or adapter can't be read or don't fit, when `out` is there already or can't be written, where the
    merged weights, still in float32, compute something else than base + adapter, or where transformers could not load what would be
    written. ConfigError for a base that is quantized.
    """
    start, target = time.perf_counter(), Path(out)
    require_new_folder(target, in_words("--out", "out:"))
    tokenizer = load_tokenizer(_tokenizer_of(adapter) or model, revision=None if _tokenizer_of(adapter) else revision)
    base = load_base(model, revision=revision, asked_by=in_words("--model", "model"))
    peft = attach(base, adapter, in_words("--adapter", "adapter"), grow=True)
    probe = _probe(peft)
    before = peft(input_ids=probe).logits.float()
    merged: Any = _merged(peft, adapter, in_words("--adapter", "adapter"))
    _refuse_unloadable(merged)
    _refuse_other_numbers(before, merged(input_ids=probe).logits, adapter)
    merged = merged.to(getattr(torch, dtype))
    after = merged(input_ids=probe).logits.float()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
            folder = Path(temporary) / "model"
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            folder.rename(target)  # over an empty folder, if there is one
    except OSError as error:
        raise DataError(
            f"{in_words('--out ', 'out: ')}{target} can't be written ({error}). Give another folder."
        ) from error
    return MergeReport(
        target, float((before - after).abs().max()), float(_kl(before, after)), time.perf_counter() - start
    )


def _refuse_unloadable(model: PreTrainedModel) -> None:
    """DataError where the model would be saved with a config that AutoModelForCausalLM doesn't take."""
    known = type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(model.config, "auto_map", None)
    if not known:
        raise DataError(
            f"--model: transformers saves a {type(model).__name__} with a {type(model.config).__name__}, which AutoModelForCausalLM "
            "can't load again, so nothing was written. Merge with peft inside of the whole model (merge_and_unload), and save that."
        )


def _refuse_other_numbers(before: Tensor, merged: Tensor, adapter: str) -> None:
    """DataError where merging in float32 changed more than rounding does (`MERGE_ROUNDING` of the largest logit is room above it)."""
    off = float((before - merged.float()).abs().max() / before.abs().max().clamp_min(1e-20))
    if not off <= MERGE_ROUNDING:
        raise DataError(
            f"{in_words('--adapter', 'adapter')}: {adapter}: merged into this base in float32, the logits are off by "
            f"{off:.2g} of the largest: this model reads a weight that the adapter changes in another "
            "way than through its layer, so nothing was written. Keep the adapter beside the base."
        )


MERGE_ROUNDING = 1e-3


def _tokenizer_of(adapter: str) -> str | None:
    """The adapter's folder where it changes what tokens mean and has a tokenizer of its own."""
    files = peft_adapters.find_adapter(adapter, in_words("--adapter", "adapter"))
    own = (files.folder / "tokenizer_config.json").is_file()
    return str(files.folder) if own and brings_tokens(files) else None


def _probe(model: PeftModel) -> Tensor:
    """8 rows of 32 tokens, the same for everybody."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocabulary, (8, 32), generator=torch.Generator().manual_seed(0))


def _kl(before: Tensor, after: Tensor) -> Tensor:
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()
