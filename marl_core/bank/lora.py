"""LoRA configs and adapter weights: made, checked against the base, read from and written to PEFT's own format."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from marl_core.bank.lean import keep_less
from marl_core.config.adapter_files import WEIGHTS_FILE, AdapterFiles, read_adapter
from marl_core.config.hub import is_hub_adapter
from marl_core.config.lora_checks import REWRITING, REWRITING_OPTIONS
from marl_core.errors import ConfigError, DataError

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_name(name: str, taken: Iterable[str]) -> None:
    """ConfigError unless `name` can be a new adapter's or head's."""
    if (
        not _NAME.fullmatch(name) or name.startswith("__") or name in "lora_"
    ):  # peft mistakes parts of its prefix for it
        raise ConfigError(
            f"{name!r} can't name an adapter: use letters, digits, - and _, 64 at most, and no part of 'lora_'."
        )
    if name in taken:
        raise ConfigError(f"This bank already has an adapter or head {name!r}; give the new one another name.")


def linear_names(base: nn.Module, head: nn.Module | None) -> list[str]:
    """Full names of the base's linear layers but for its LM head, taken before any adapter is injected."""
    return [
        name for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def expand_targets(targets: Any, linears: Iterable[str]) -> list[str]:
    """`all-linear`, a regular expression or a list, as names that can't match an already injected layer."""
    names = list(linears)
    if targets == "all-linear":
        return sorted({name.rsplit(".", 1)[-1] for name in names})
    if isinstance(targets, str):
        try:
            chosen = [name for name in names if re.fullmatch(targets, name)]
        except re.error as error:
            raise ConfigError(
                f"LoRA targets {targets!r} is neither a module name nor a regular expression: {error}."
            ) from error
        chosen = chosen or [name for name in names if name.rsplit(".", 1)[-1] == targets]
    else:
        chosen = [t for t in targets if any(name == t or name.endswith("." + t) for name in names)]
        unknown = sorted(set(targets) - set(chosen))
        if unknown:
            known = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ConfigError(f"LoRA targets {unknown} name no linear layer of this base. It has: {', '.join(known)}.")
    if not chosen:
        raise ConfigError(f"LoRA targets {targets!r} match no linear layer of this base.")
    return sorted(chosen)


def make_config(
    r: int, alpha: float, targets: Any, dropout: float, extra: Mapping[str, Any], linears: Iterable[str]
) -> LoraConfig:
    """A LoraConfig for a trainable role; ConfigError names an option that peft doesn't know."""
    try:
        return LoraConfig(
            **{
                "r": r,
                "lora_alpha": alpha,
                "target_modules": expand_targets(targets, linears),
                "lora_dropout": dropout,
                "task_type": "CAUSAL_LM",
                **extra,
            }
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora: peft's LoraConfig doesn't accept {dict(extra)}: {error}.") from error


def find_adapter(
    path: str | Path, asked_by: str, revision: str | None = None, subfolder: str | None = None
) -> AdapterFiles:
    """A local adapter folder, or one fetched from the hub by name, at `revision`; in `subfolder` of either."""
    if not is_hub_adapter(str(path)):
        return read_adapter(os.path.join(path, subfolder) if subfolder else path, asked_by)
    from huggingface_hub import snapshot_download

    inside = f"{subfolder}/" if subfolder else ""
    patterns = [inside + kind for kind in ("*.json", "*.safetensors", "*.jinja", "tokenizer*")]
    try:
        folder = snapshot_download(str(path), revision=revision, allow_patterns=patterns)
    except Exception as error:
        at = f" at revision {revision!r}" if revision else ""
        raise DataError(
            f"{asked_by}: {str(path)!r} is no local folder and could not be had from the hub{at} ({type(error).__name__}). "
            "Check the spelling, or download it first and give the folder."
        ) from error
    return read_adapter(Path(folder, subfolder or ""), asked_by)


PLAIN = "Use init_lora_weights true or gaussian, and no option that starts from the base's own weights."


def rewriting(config: LoraConfig) -> str | None:
    """Which option of a LoRA is known to change the base that all roles share, in words; None when none is."""
    start = config.init_lora_weights
    if isinstance(start, str) and start.startswith(REWRITING):
        return f"init_lora_weights {start!r} rewrites the base's weights"
    for name in REWRITING_OPTIONS:
        if getattr(config, name, None) is not None:
            return f"{name} rewrites the base's weights"
    if config.trainable_token_indices or config.layer_replication:
        return "trainable_token_indices or layer_replication change the base"
    return None


def refuse_rewriting(config: LoraConfig, files: AdapterFiles, asked_by: str) -> None:
    """DataError when injecting this adapter would change the base that all roles share."""
    wrong = rewriting(config)
    if wrong:
        raise DataError(
            f"{asked_by}: {files.folder}: {wrong} when it is loaded, and all roles share the base. Convert it to a plain LoRA (PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)), or merge it (reference: merged-base, marl merge)."
        )


def config_of(files: AdapterFiles, linears: Iterable[str], asked_by: str) -> LoraConfig:
    """The adapter's LoraConfig, ready to be injected beside others (heads are read separately, see heads.py)."""
    kind = files.config.get("peft_type")
    try:
        config = PeftConfig.from_pretrained(str(files.folder)) if kind == "LORA" else None
    except Exception as error:  # unknown keys, wrong types: peft checks few of them
        raise DataError(f"{asked_by}: peft can't read the config of {files.folder}: {error}. Save it again.") from error
    if not isinstance(config, LoraConfig):
        raise DataError(f"{asked_by}: {files.folder} is a {kind} adapter; marl's bank holds LoRA adapters.")
    if config.bias != "none":
        raise DataError(
            f"{asked_by}: {files.folder} was trained with bias: {config.bias!r}, which changes the base's own biases. "
            "Train it again with bias='none'."
        )
    names = list(linears)
    try:
        config.target_modules = expand_targets(config.target_modules, names)
    except (ConfigError, TypeError) as error:
        raise DataError(
            f"{asked_by}: {files.folder} adapts layers that can't be adapted here: it was trained on another base, or on the "
            f"embedding or output layer. {error}"
        ) from error
    config.modules_to_save = None
    config.inference_mode = False
    return config


def inject(peft: PeftModel | None, base: Any, name: str, config: LoraConfig) -> PeftModel:
    """Add an adapter to the base; ConfigError when peft can't, e.g. for layers_to_transform that match nothing."""
    try:
        if peft is None:
            peft = PeftModel(base, config, adapter_name=name)
        else:
            peft.add_adapter(name, config)
    except Exception as error:  # whatever an odd adapter_config.json makes of it
        raise ConfigError(f"adapter {name!r}: peft can't add it to this base: {error}") from error
    keep_less(base)
    return peft


def load_weights(peft: PeftModel, name: str, files: AdapterFiles, asked_by: str) -> None:
    """Fill adapter `name` from the file; every tensor must have its place and its shape, none may be left over."""
    wanted = {key: tuple(tensor.shape) for key, tensor in adapter_tensors(peft, name).items()}
    heads = set(files.score_keys)
    found = {key: shape for key, shape in files.shapes.items() if key not in heads}
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    misfits = [key for key in wanted if key in found and wanted[key] != found[key]]
    if missing or extra or misfits:
        lines = [f"{len(missing)} tensors are missing (first: {missing[:3]})"] if missing else []
        lines += [f"{len(extra)} have no place in this base (first: {extra[:3]})"] if extra else []
        lines += [f"{key} is {found[key]}, this base needs {wanted[key]}" for key in misfits[:3]]
        raise DataError(
            f"{asked_by}: the adapter {files.folder} doesn't fit this base: {'; '.join(lines)}. "
            f"It says it was trained on {files.base_name!r}: use that base, or another adapter."
        )
    try:
        tensors = {key: tensor for key, tensor in load_file(str(files.weights)).items() if key not in heads}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{asked_by}: {files.weights} can't be read ({error}). Copy or save it again.") from error
    bad = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise DataError(
            f"{asked_by}: {files.weights} holds NaN or infinite weights (first: {bad[0]}). Save the adapter again."
        )
    set_peft_model_state_dict(peft, tensors, adapter_name=name)


def adapter_tensors(peft: PeftModel, name: str) -> dict[str, Tensor]:
    """The adapter's tensors under the names PEFT gives them in a file."""
    tensors: dict[str, Tensor] = get_peft_model_state_dict(peft, adapter_name=name, save_embedding_layers=False)
    return tensors


def write_adapter(peft: PeftModel, name: str, folder: Path, base_name: str | None) -> None:
    """Write the adapter in PEFT's format, so that plain peft, transformers and vLLM load it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = peft.peft_config[name]
    inference, base = config.inference_mode, config.base_model_name_or_path
    config.inference_mode, config.base_model_name_or_path = True, base_name
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode, config.base_model_name_or_path = inference, base
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in adapter_tensors(peft, name).items()}
    save_file(tensors, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
