"""Adapters as PEFT has them: made on a base and checked against it, read from and written to PEFT's own files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import NoMatchingPeftModuleError, PeftConfig
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from marl_core.artifacts.adapter_files import PEFT_PREFIX, WEIGHTS_FILE, AdapterFiles, read_adapter
from marl_core.artifacts.adapter_kinds import known_kind, refusals, target_parameters
from marl_core.artifacts.architecture import leaves
from marl_core.artifacts.hub import hub_read, is_commit, is_hub_adapter
from marl_core.artifacts.kind_table import EIGHT_BIT, FOUR_BIT
from marl_core.bank.experts import leave_counters
from marl_core.bank.guard import unusual
from marl_core.bank.mount import PEFT_NAME, ChangedTree, Mounted
from marl_core.bank.out_of_memory import raise_if_out_of_memory
from marl_core.bank.targets import Layers, expand_targets
from marl_core.errors import ConfigError, DataError
from marl_core.plan.adapter_checks import per_expert, unconverted
from marl_core.registry.strategy import Quantization

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_name(name: str, taken: Iterable[str]) -> None:
    """ConfigError unless `name` can be a new adapter's or head's: it names folders and metrics too."""
    if not _ADAPTER_NAME.fullmatch(name):
        raise ConfigError(f"{name!r} can't name an adapter: use letters, digits, - and _, 64 at most.")
    if name in taken:
        raise ConfigError(f"This bank already has an adapter or head {name!r}; give the new one another name.")


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


def quantization_name(quantization: Quantization) -> str | None:
    """What the table of kinds calls the way a base is held; None where it isn't quantized."""
    config: Any = quantization.config
    if config is None:
        return None
    if getattr(config, "load_in_4bit", False):
        return FOUR_BIT
    if getattr(config, "load_in_8bit", False):
        return EIGHT_BIT
    method = getattr(config, "quant_method", type(config).__name__)
    return str(getattr(method, "value", method))


def config_of(files: AdapterFiles, linears: Iterable[str], asked_by: str, kind: str | None = None) -> PeftConfig:
    """The adapter's config, ready to be injected beside others (heads are read separately, see heads.py).

    DataError when the adapter is of a kind that the shared base, a model of type `kind`, can't hold.
    """
    wrong = [*refusals(files, "shared"), *per_expert(files, kind)]
    if wrong:
        raise DataError("\n".join(f"{asked_by}: {sentence}" for sentence in wrong))
    try:
        config: Any = PeftConfig.from_pretrained(str(files.folder))
    except Exception as error:  # unknown keys, wrong types: peft checks few of them
        raise DataError(f"{asked_by}: peft can't read the config of {files.folder}: {error}. Save it again.") from error
    if getattr(config, "target_modules", None) == "all-linear":  # PEFT's own has layers that a pass doesn't reach
        config.target_modules = expand_targets("all-linear", linears)
    if hasattr(config, "modules_to_save"):
        config.modules_to_save = None  # what it names is a score head, or `refusals` would have said so
    config.inference_mode = False
    typed: PeftConfig = config
    return typed


def set_dropout(config: Any, dropout: float, asked_by: str) -> None:
    """Set the adapter's own dropout. ConfigError when its kind has none and `dropout` isn't 0."""
    fields = [name for name in vars(config) if name.endswith("dropout")]
    if not fields and dropout:
        raise ConfigError(
            f"{asked_by}: dropout: {dropout}, and adapters of the kind {kind_of(config)} have none. Set it to 0."
        )
    for name in fields:
        setattr(config, name, dropout if dropout or isinstance(getattr(config, name), float) else 0.0)


def kind_of(config: Any) -> str:
    """What PEFT calls an adapter's kind, in lower case."""
    kind = getattr(config, "peft_type", None)
    return str(getattr(kind, "value", kind)).lower()


def make(base: Any, name: str, config: PeftConfig, linears: Layers) -> Mounted:
    """An adapter on the bare base; ConfigError when peft can't make it, e.g. for layers_to_transform that match nothing."""
    asked = target_parameters({"target_parameters": getattr(config, "target_parameters", None)})
    try:
        mounted = Mounted(base, config, known_kind(config.peft_type, vars(config)).never_learns)
    except ChangedTree as error:
        raise ConfigError(
            f"adapter {name!r}: {error}, and all roles share the model. Use another kind of adapter."
        ) from error
    except Exception as error:  # whatever an odd adapter_config.json makes of it
        raise_if_out_of_memory(error)
        # errors of these kinds come from a value of another type than peft knows, any other may be about the targets
        odd = isinstance(error, TypeError | AttributeError)
        rest = (
            f" Its config has a value of a wrong type; look at r, lora_alpha, lora_dropout and: {unusual(config)}."
            if odd
            else _instead(linears)
            if _is_about_targets(error)
            else " Change the adapter's options."
        )
        said = str(error).rstrip()
        stop = "" if said.endswith((".", "!", "?")) else "."
        raise ConfigError(f"adapter {name!r}: peft can't add it to this base: {said}{stop}{rest}") from error
    targeted = getattr(mounted.peft.base_model, "targeted_parameter_names", ())
    lost = sorted(asked - {key for key in asked if any(_ends(found, key) for found in targeted)})
    if lost:
        raise ConfigError(
            f"adapter {name!r}: target_parameters {', '.join(lost)} name no weight of this base. Its layers' own names are those of "
            "model.named_parameters(), e.g. mlp.experts.down_proj."
        )
    if not mounted.places:
        raise ConfigError(f"adapter {name!r}: peft put it on no layer of this base.{_instead(linears)}")
    for layer in mounted.layers.values():
        leave_counters(layer)
    return mounted


def cannot_stand(files: AdapterFiles, error: ConfigError, asked_by: str) -> DataError:
    """Why an adapter file's LoRA can't be added to this base, in the file's terms."""
    cause, wanted = error.__cause__, files.config.get("target_modules") or files.config.get("target_parameters")
    if isinstance(cause, NoMatchingPeftModuleError):
        what = f"adapts layers ({wanted}) of which this model has none"
    else:
        what = "can't be put on this base"
    return DataError(f"{asked_by}: {files.folder} {what}. {error} It says it was trained on {files.base_name!r}.")


def odd_layer(base: nn.Module, name: str, mounted: Mounted, linears: Layers, error: Exception) -> str:
    """Which layer of the model can't run with adapter `name` in it, told by where the error came from."""
    paths = {module: path for path, module in base.named_modules()}
    paths |= {place.own: place.name for place in mounted.places} | {place.layer: place.name for place in mounted.places}
    owners, trace = [], error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and paths.get(owner):
            owners.append(owner)
        trace = trace.tb_next
    inside = {owner: [place for place in mounted.places if _is_in(place.name, paths[owner])] for owner in owners}
    inner = next((owner for owner in reversed(owners) if inside[owner]), base)
    path, places = paths.get(inner, ""), inside.get(inner, mounted.places)
    adapted = leaves(place.name for place in places)
    left = [leaf for leaf in leaves(linears) if leaf not in adapted]
    own = next((place.own for place in places if inner in (place.own, place.layer)), inner)
    return (
        f"adapter {name!r}: {path or 'the model'} ({type(own).__name__}) can't run with an adapter on {', '.join(adapted)}: "
        f"{type(error).__name__}: {error}. Leave those out: name other layers as targets, e.g. {', '.join(left) or 'none is left'}."
    )


def _is_in(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def refuse_output_layer(base: Any, name: str, mounted: Mounted) -> None:
    """ConfigError when the adapter stands on the output layer: log-probs are read from that layer's own weight."""
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if any(place.own is head for place in mounted.places):
        tied = any(place.own is embedding for place in mounted.places) and head.weight is embedding.weight
        way_out = (
            "The model's embedding is tied to it: use a model whose isn't" if tied else "Leave it out of the targets"
        )
        raise ConfigError(
            f"adapter {name!r}: it adapts the output layer, whose own weight all roles read their log-probs from, so what it learns "
            f"there would be lost. {way_out}."
        )


def refuse_unreadable(name: str, mounted: Mounted, linears: Layers) -> None:
    """ConfigError when peft wouldn't find all of this adapter again in its own file: of some models it changes names on reading."""
    mine = mounted.file_tensors()
    read = convert_peft_adapter_state_dict_for_transformers(mounted.peft, mounted.config, dict(mine), PEFT_NAME)
    gone = [key.removeprefix(PEFT_PREFIX) for key in set(mine) - set(read)]
    lost = sorted({place.name for place in mounted.places if any(_is_in(key, place.name) for key in gone)})
    if lost:
        base: Any = mounted.peft.get_base_model()
        left = [leaf for leaf in leaves(linears) if leaf not in leaves(lost)]
        raise ConfigError(
            f"adapter {name!r}: peft changes the names of {len(lost)} layers of a {getattr(base.config, 'model_type', 'model')} when it "
            f"reads an adapter (first: {lost[0]}), so their weights would be lost from every saved one. Leave those out: name other "
            f"layers as targets, e.g. {', '.join(left) or 'none is left'}."
        )


def _is_about_targets(error: Exception) -> bool:
    """Whether PEFT says that layers aren't there, or are of a kind that it can't adapt."""
    said = str(error).lower()
    return isinstance(error, NoMatchingPeftModuleError) or "target" in said or "is not supported" in said


def _instead(linears: Layers) -> str:
    known = ", ".join(leaves(linears))
    return (
        f" It can adapt these layers: {known}. Name those among them that you mean as targets, or change its options."
    )


def _ends(name: str, key: str) -> bool:
    return name == key or name.endswith("." + key)


def load_weights(mounted: Mounted, files: AdapterFiles, asked_by: str) -> None:
    """Fill an adapter, which stands in the tree, from the file; every tensor must have its place and shape, none may be left over."""
    mine, base = mounted.file_tensors(), mounted.peft.get_base_model()
    tensors = _as_peft_reads(mounted, _read(mounted, files, asked_by), files, asked_by)
    wanted = {key: tuple(tensor.shape) for key, tensor in mine.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    missing, extra = sorted(set(wanted) - set(shapes)), sorted(set(shapes) - set(wanted))
    misfits = [key for key in wanted if key in shapes and wanted[key] != shapes[key]]
    if missing or extra or misfits:
        lines = [f"{len(missing)} tensors are missing (first: {missing[:3]})"] if missing else []
        lines += [f"{len(extra)} have no place in this base (first: {extra[:3]})"] if extra else []
        lines += [f"{key} is {shapes[key]}, this base needs {wanted[key]}" for key in misfits[:3]]
        single = unconverted(files, getattr(base.config, "model_type", None), extra)
        if single:
            raise DataError(f"{asked_by}: {single}")
        raise DataError(
            f"{asked_by}: the adapter {files.folder} doesn't fit this base: {'; '.join(lines)}. {_whose(files, base)}"
        )
    lost = _not_saved(base, files)
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
    try:
        mounted.fill(tensors)
    except (ValueError, RuntimeError) as error:
        raise DataError(
            f"{asked_by}: {files.folder} can't be put into a {kind_of(mounted.config)} adapter here: {error}."
        ) from error


def _not_saved(base: nn.Module, files: AdapterFiles) -> list[str]:
    """Layers of this model that the adapter's config names as saved whole, of which its file has nothing."""
    named = files.config.get("modules_to_save") or []
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


def _read(mounted: Mounted, files: AdapterFiles, asked_by: str) -> dict[str, Tensor]:
    """The adapter's tensors; names in which peft's default adapter name was left are brought to the usual form."""
    heads = {name for name in files.shapes if name in files.score_keys or ".original_module." in name}
    try:
        tensors = load_file(str(files.weights))
    except (SafetensorError, OSError) as error:
        raise DataError(f"{asked_by}: {files.weights} can't be read ({error}). Copy or save it again.") from error
    named = re.compile(rf"(\.{re.escape(mounted.peft.base_model.prefix)}\w+)\.default(?=\.|$)")
    return {named.sub(r"\1", key): tensor for key, tensor in tensors.items() if key not in heads}


def _as_peft_reads(
    mounted: Mounted, tensors: dict[str, Tensor], files: AdapterFiles, asked_by: str
) -> dict[str, Tensor]:
    """The tensors as peft converts them for this model: experts one by one become one tensor for all, as in transformers 5."""
    try:
        converted: dict[str, Tensor] = convert_peft_adapter_state_dict_for_transformers(
            model=mounted.peft, peft_config=mounted.config, adapter_state_dict=tensors, adapter_name=PEFT_NAME
        )
    except Exception as error:  # whatever odd names make of it
        raise DataError(
            f"{asked_by}: peft can't convert the tensors of {files.folder} to this model's layers ({type(error).__name__}: {error}). "
            "Load and merge it with the versions of transformers and peft that wrote it, and use the merged model."
        ) from error
    return converted


def write_adapter(mounted: Mounted, folder: Path, base_name: str | None) -> None:
    """Write an adapter, which stands in the tree, in PEFT's format, so that plain peft, transformers and vLLM load it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = deepcopy(mounted.config)
    config.inference_mode, config.base_model_name_or_path = True, base_name
    config.save_pretrained(str(folder))
    tensors = {
        key: tensor.cpu().clone().contiguous() for key, tensor in mounted.file_tensors().items()
    }  # kinds share some
    save_file(tensors, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
