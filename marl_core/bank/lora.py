"""LoRA configs and adapter weights: made, checked against the base, read from and written to PEFT's own format."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, NoMatchingPeftModuleError, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from marl_core.artifacts.adapter_files import PEFT_PREFIX, WEIGHTS_FILE, AdapterFiles, read_adapter
from marl_core.artifacts.adapter_kinds import REWRITING, REWRITING_OPTIONS, VARIANTS, refusals, target_parameters
from marl_core.artifacts.architecture import leaves
from marl_core.artifacts.hub import hub_read, is_commit, is_hub_adapter
from marl_core.bank.experts import leave_counters
from marl_core.bank.guard import unusual
from marl_core.bank.out_of_memory import raise_if_out_of_memory
from marl_core.bank.parts import adapter_parts, file_tensors
from marl_core.bank.targets import expand_targets, linear_names
from marl_core.errors import ConfigError, DataError
from marl_core.plan.adapter_checks import per_expert, unconverted

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CONTAINER = nn.ModuleDict()


def check_name(name: str, taken: Iterable[str]) -> None:
    """ConfigError unless `name` can be a new adapter's or head's."""
    if (
        not _ADAPTER_NAME.fullmatch(name) or name.startswith("__") or name in "lora_"
    ):  # peft mistakes these for its prefix
        raise ConfigError(
            f"{name!r} can't name an adapter: use letters, digits, - and _, 64 at most, and no part of 'lora_'."
        )
    if hasattr(_CONTAINER, name):  # torch keeps adapters by name in containers that have these already
        raise ConfigError(
            f"{name!r} can't name an adapter: torch's containers of modules have it as a name of their own."
        )
    if name in taken:
        raise ConfigError(f"This bank already has an adapter or head {name!r}; give the new one another name.")


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
    inside = f"{subfolder}/" if subfolder else ""
    patterns = [inside + kind for kind in ("*.json", "*.safetensors", "*.jinja", "tokenizer*")]
    try:
        with hub_read(str(path), asked_by, revision):
            folder = _snapshot(str(path), revision, patterns)
    except DataError:
        raise
    except Exception as error:
        at = f" at revision {revision!r}" if revision else ""
        raise DataError(
            f"{asked_by}: {str(path)!r} is no local folder and could not be downloaded from the hub{at} ({type(error).__name__}). "
            "Check the spelling, or download it first and give the folder."
        ) from error
    return read_adapter(Path(folder, subfolder or ""), asked_by)


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception:
        if is_commit(revision):  # huggingface_hub 1.33 asks the network for a commit that is here
            with suppress(Exception):
                return snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True)
        raise


PLAIN = "Use init_lora_weights true or gaussian, and no option that starts from the base's own weights or trains them."


def changing(config: LoraConfig) -> str | None:
    """Which option of a LoRA is known to change the base that all roles share, in words; None when none is."""
    start = config.init_lora_weights
    if isinstance(start, str) and start.startswith(REWRITING):
        return f"init_lora_weights {start!r} rewrites the base's weights"
    for name in REWRITING_OPTIONS:
        if getattr(config, name, None) is not None:
            return f"{name} rewrites the base's weights"
    if config.trainable_token_indices or config.layer_replication:
        return "trainable_token_indices or layer_replication change the base"
    if config.modules_to_save:
        return f"modules_to_save {sorted(config.modules_to_save)} trains whole modules of the base"
    if config.bias != "none":
        return f"bias {config.bias!r} trains the base's own biases"
    for name, what in VARIANTS.items():
        if getattr(config, name, None) not in (None, False):
            return f"such a LoRA {what} ({name})"
    return None


def config_of(files: AdapterFiles, linears: Iterable[str], asked_by: str, kind: str | None = None) -> LoraConfig:
    """The adapter's LoraConfig, ready to be injected beside others (heads are read separately, see heads.py).

    DataError when the adapter is of a kind that the shared base, a model of type `kind`, can't hold.
    """
    wrong = [*refusals(files, "shared"), *per_expert(files, kind)]
    if wrong:
        raise DataError("\n".join(f"{asked_by}: {sentence}" for sentence in wrong))
    try:
        config = PeftConfig.from_pretrained(str(files.folder))
    except Exception as error:  # unknown keys, wrong types: peft checks few of them
        raise DataError(f"{asked_by}: peft can't read the config of {files.folder}: {error}. Save it again.") from error
    if not isinstance(config, LoraConfig):
        raise DataError(f"{asked_by}: {files.folder} is a {config.peft_type} adapter; marl's bank holds LoRA adapters.")
    if config.target_modules == "all-linear":  # PEFT's own would find other adapters' matrices
        config.target_modules = expand_targets("all-linear", linears)
    config.modules_to_save = None  # what it names is a score head, or `refusals` would have said so
    config.inference_mode = False
    return config


def inject(peft: PeftModel | None, base: Any, name: str, config: LoraConfig) -> PeftModel:
    """Add an adapter to the base; ConfigError when peft can't, e.g. for layers_to_transform that match nothing."""
    asked = target_parameters({"target_parameters": config.target_parameters})
    try:
        if peft is None:
            peft = PeftModel(base, config, adapter_name=name)
        else:
            peft.add_adapter(name, config)
    except Exception as error:  # whatever an odd adapter_config.json makes of it
        take_out(peft, base, name)
        raise_if_out_of_memory(error)
        # errors of these kinds come from a value of another type than peft knows, any other may be about the targets
        odd = isinstance(error, TypeError | AttributeError)
        rest = (
            f" Its config has a value of a wrong type; look at r, lora_alpha, lora_dropout and: {unusual(config)}."
            if odd
            else _instead(base)
        )
        raise ConfigError(f"adapter {name!r}: peft can't add it to this base: {error}{rest}") from error
    lost = sorted(
        asked - {key for key in asked if any(_ends(targeted, key) for targeted in peft.targeted_parameter_names)}
    )
    if lost:
        take_out(peft, base, name)
        raise ConfigError(
            f"adapter {name!r}: target_parameters {', '.join(lost)} name no weight of this base. Its layers' own names are those of "
            "model.named_parameters(), e.g. mlp.experts.down_proj."
        )
    leave_counters(base)
    return peft


def take_out(peft: PeftModel | None, base: nn.Module, name: str) -> None:
    """Undo an adding that failed half-way: no layer of the base holds the adapter, nor a wrapper that is there for it alone."""
    if peft is not None:
        peft.peft_config.pop(name, None)
    for parent in list(base.modules()):
        for attribute, child in list(parent.named_children()):
            if not isinstance(child, BaseTunerLayer) or isinstance(parent, BaseTunerLayer):
                continue
            others = {key for part in child.adapter_layer_names for key in getattr(child, part, {})} - {name}
            if others:
                child.delete_adapter(name)
            else:
                setattr(parent, attribute, child.get_base_layer())
    if not any(isinstance(module, BaseTunerLayer) for module in base.modules()) and hasattr(base, "peft_config"):
        del base.peft_config


def cannot_stand(files: AdapterFiles, error: ConfigError, asked_by: str) -> DataError:
    """Why an adapter file's LoRA can't be added to this base, in the file's terms."""
    cause, wanted = error.__cause__, files.config.get("target_modules") or files.config.get("target_parameters")
    if isinstance(cause, NoMatchingPeftModuleError):
        what = f"adapts layers ({wanted}) of which this model has none"
    else:
        what = "can't be put on this base"
    return DataError(f"{asked_by}: {files.folder} {what}. {error} It says it was trained on {files.base_name!r}.")


def odd_layer(base: nn.Module, name: str, error: Exception) -> str:
    """Which layer of the model can't run with adapter `name` in it, told by where the error came from."""
    paths = {module: path for path, module in base.named_modules()}
    owners, trace = [], error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and paths.get(owner):
            owners.append(owner)
        trace = trace.tb_next
    inner = next((owner for owner in reversed(owners) if any(True for _ in adapter_parts(owner, name))), base)
    path = paths[inner]
    adapted = leaves(f"{path}.{part.name}".split(".lora_")[0].strip(".") for part in adapter_parts(inner, name))
    left = [leaf for leaf in leaves(linear_names(base, base.get_output_embeddings())) if leaf not in adapted]  # type: ignore[operator]
    what = type(inner.get_base_layer() if isinstance(inner, BaseTunerLayer) else inner).__name__
    return (
        f"adapter {name!r}: {path or 'the model'} ({what}) can't run with an adapter on {', '.join(adapted)}: "
        f"{type(error).__name__}: {error}. Leave those out: name other layers as targets, e.g. {', '.join(left) or 'none is left'}."
    )


def refuse_output_layer(base: Any, name: str) -> None:
    """ConfigError when the adapter stands on the output layer: log-probs are read from that layer's own weight."""
    head = base.get_output_embeddings()
    if isinstance(head, BaseTunerLayer) and name in head._all_available_adapter_names():
        raise ConfigError(
            f"adapter {name!r}: it adapts the output layer, whose own weight all roles read their log-probs from, so what it learns "
            "there would be lost. Leave it out of the targets."
        )


def refuse_unreadable(peft: PeftModel, name: str) -> None:
    """ConfigError when peft wouldn't find all of this adapter again in its own file: of some models it changes names on reading."""
    mine = adapter_tensors(peft, name)
    read = convert_peft_adapter_state_dict_for_transformers(peft, peft.peft_config[name], dict(mine), name)
    lost = sorted({key.removeprefix(PEFT_PREFIX).split(".lora_")[0] for key in set(mine) - set(read)})
    if lost:
        base: Any = peft.get_base_model()
        left = [leaf for leaf in leaves(linear_names(base, base.get_output_embeddings())) if leaf not in leaves(lost)]
        raise ConfigError(
            f"adapter {name!r}: peft changes the names of {len(lost)} layers of a {getattr(base.config, 'model_type', 'model')} when it "
            f"reads an adapter (first: {lost[0]}), so their weights would be lost from every saved one. Leave those out: name other "
            f"layers as targets, e.g. {', '.join(left) or 'none is left'}."
        )


def _instead(base: Any) -> str:
    known = leaves(linear_names(base, base.get_output_embeddings()))
    return f" It can adapt these layers: {', '.join(known)}. Name those among them that you mean as targets."


def _ends(name: str, key: str) -> bool:
    return name == key or name.endswith("." + key)


def load_weights(peft: PeftModel, name: str, files: AdapterFiles, asked_by: str) -> None:
    """Fill adapter `name` from the file; every tensor must have its place and its shape, none may be left over."""
    mine = adapter_tensors(peft, name)
    tensors = _as_peft_reads(peft, name, _read(files, asked_by), files, asked_by)
    wanted = {key: tuple(tensor.shape) for key, tensor in mine.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    missing, extra = sorted(set(wanted) - set(shapes)), sorted(set(shapes) - set(wanted))
    misfits = [key for key in wanted if key in shapes and wanted[key] != shapes[key]]
    if missing or extra or misfits:
        lines = [f"{len(missing)} tensors are missing (first: {missing[:3]})"] if missing else []
        lines += [f"{len(extra)} have no place in this base (first: {extra[:3]})"] if extra else []
        lines += [f"{key} is {shapes[key]}, this base needs {wanted[key]}" for key in misfits[:3]]
        base: Any = peft.get_base_model()
        single = unconverted(files, getattr(base.config, "model_type", None), extra)
        if single:
            raise DataError(f"{asked_by}: {single}")
        raise DataError(
            f"{asked_by}: the adapter {files.folder} doesn't fit this base: {'; '.join(lines)}. {_whose(files, base)}"
        )
    lost = _not_saved(peft, files)
    if lost:
        raise DataError(
            f"{asked_by}: {files.folder} says that {', '.join(lost)} was trained whole (modules_to_save), and its file holds no such "
            "weights: without them its numbers would be others. Save the adapter again with PEFT's save_pretrained, or take the "
            "names out of modules_to_save if those layers are as the base has them."
        )
    bad = [
        key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor.float()).all())
    ]  # as float: no 8-bit dtype is asked itself
    if bad:
        raise DataError(
            f"{asked_by}: {files.weights} holds NaN or infinite weights (first: {bad[0]}). Save the adapter again."
        )
    with torch.no_grad():
        for key, tensor in mine.items():
            tensor.copy_(tensors[key])


def _not_saved(peft: PeftModel, files: AdapterFiles) -> list[str]:
    """Layers of this model that the adapter's config names as saved whole, of which its file has nothing."""
    named = files.config.get("modules_to_save") or []
    base: Any = peft.get_base_model()
    paths = [path for path, _ in base.named_modules()]
    here = [name for name in named if any(_ends(path, str(name)) for path in paths)]
    return [name for name in here if not any(f".{name}." in f".{key}" for key in files.shapes)]


def _whose(files: AdapterFiles, base: Any) -> str:
    """What to do about an adapter that doesn't fit, by whether it names this very base."""
    here = str(getattr(base, "name_or_path", ""))
    if files.base_name and (files.base_name == here or os.path.realpath(files.base_name) == os.path.realpath(here)):
        return (
            "It names this very base, whose layers have other names here than where it was trained (another class of the same model, or "
            "other versions of transformers and peft): merge it there and give the merged model as model.path, or save it again here."
        )
    return f"It says it was trained on {files.base_name!r}: use that base, or another adapter."


def _read(files: AdapterFiles, asked_by: str) -> dict[str, Tensor]:
    """The LoRA's tensors; names in which peft's default adapter name was left are brought to the usual form."""
    heads = {name for name in files.shapes if name in files.score_keys or ".original_module." in name}
    try:
        tensors = load_file(str(files.weights))
    except (SafetensorError, OSError) as error:
        raise DataError(f"{asked_by}: {files.weights} can't be read ({error}). Copy or save it again.") from error
    return {re.sub(r"(\.lora_\w+)\.default(?=\.|$)", r"\1", key): t for key, t in tensors.items() if key not in heads}


def _as_peft_reads(
    peft: PeftModel, name: str, tensors: dict[str, Tensor], files: AdapterFiles, asked_by: str
) -> dict[str, Tensor]:
    """The tensors as peft converts them for this model: experts one by one become one tensor for all, as in transformers 5."""
    try:
        converted: dict[str, Tensor] = convert_peft_adapter_state_dict_for_transformers(
            model=peft, peft_config=peft.peft_config[name], adapter_state_dict=tensors, adapter_name=name
        )
    except Exception as error:  # whatever odd names make of it
        raise DataError(
            f"{asked_by}: peft can't convert the tensors of {files.folder} to this model's layers ({type(error).__name__}: {error}). "
            "Load and merge it with the versions of transformers and peft that wrote it, and use the merged model."
        ) from error
    return converted


def adapter_tensors(peft: PeftModel, name: str) -> dict[str, Tensor]:
    """The adapter's tensors under the names PEFT gives them in a file."""
    return file_tensors(peft.get_base_model(), name)


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
