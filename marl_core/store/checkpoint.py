"""Checkpoints: safetensors and JSON only, each file hashed, written beside and renamed; resume is exact on one machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from marl_core.artifacts.adapter_files import read_adapter
from marl_core.bank import peft_adapters
from marl_core.bank.adapters import AdapterBank
from marl_core.errors import DataError
from marl_core.ppo.roles import TrainableRoles
from marl_core.store.files import new_folder, sha256, write_json
from marl_core.store.run_state import RunState

FORMAT = 1
STRATEGIES_FILE = "strategies.safetensors"
REQUIRED_FILES = (
    "state.json",
    "optimizer.safetensors",
    "policy/adapter_model.safetensors",
    "policy/adapter_config.json",
)


def name_of(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint's folder name."""
    return int(checkpoint.name.removeprefix("step-"))


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, intact or damaged, sorted by step: names sort wrongly from a million steps on."""
    checkpoints = [
        path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal() and path.is_dir()
    ]
    return sorted(checkpoints, key=step_of)


def save(
    folder: Path,
    bank: AdapterBank,
    trained: TrainableRoles,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    keep: int = 2,
    strategies: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `folder/step-NNNNNN` whole or not at all, then drop what is older than the last `keep` up to this one.

    Checkpoints of later steps are none of this run's (`set_aside` moves them on resume): they are neither counted nor dropped.
    `strategies`: tensors that strategies want back on resume, as strategy_state.collect gives them.
    """
    target = folder / name_of(state.step)
    with new_folder(target) as temporary:
        save_weights(temporary, bank, trained)
        save_file(_optimizer_tensors(optimizer, _names(bank, trained)), temporary / "optimizer.safetensors")
        if strategies:
            save_file(dict(strategies), temporary / STRATEGIES_FILE)
        write_json(temporary / "state.json", {"format": FORMAT, **state.as_dict()})
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        write_json(temporary / "manifest.json", {str(p.relative_to(temporary)): sha256(p) for p in files})
    for old in [path for path in saved(folder) if step_of(path) <= state.step][:-keep]:
        shutil.rmtree(old, ignore_errors=True)  # this one is written; the next save tries again
    return target


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints of steps after `step` to `damaged-step-NNNNNN`; where they are now.

    A run that goes on from `step` makes those steps again: what is left of them must not be taken for newer.
    """
    moved = []
    for path in saved(folder):
        if step_of(path) > step:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


def save_weights(folder: Path, bank: AdapterBank, trained: TrainableRoles) -> None:
    """Write the weights that learn: policy/, value/ and heads.safetensors."""
    bank.save(trained.policy, folder / "policy")
    home = trained.value_home(bank)
    if trained.value_adapter:
        home.save(trained.value_adapter, folder / "value")
    if trained.value_head:
        save_file(_head_tensors(home, trained.value_head), folder / "heads.safetensors")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, compared with its manifest; None when it is whole."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            return "manifest or state can't be read (it is no table of files)"
        missing = [name for name in REQUIRED_FILES if name not in manifest]
        if missing:
            return f"its manifest doesn't list {missing[0]}"
        for name, digest in manifest.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if sha256(file) != digest:
                return f"{name}: hash differs"
        if json.loads((checkpoint / "state.json").read_text(encoding="utf-8")).get("format") != FORMAT:
            return "state.json is of another format"
    except (OSError, ValueError, AttributeError) as error:
        return f"manifest or state can't be read ({error})"
    return None


def newest(folder: Path) -> tuple[Path, list[str]]:
    """The newest whole checkpoint, and a sentence for each damaged one that was passed over. DataError if none is whole."""
    notes: list[str] = []
    for checkpoint in reversed(saved(folder)):
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint, notes
        notes.append(f"{checkpoint.name} is damaged ({wrong})")
    detail = "; ".join(notes) or "there is no checkpoint in it"
    raise DataError(f"resume: {folder} holds no whole checkpoint: {detail}. Start again in a new run.folder.")


def load(checkpoint: Path, bank: AdapterBank, trained: TrainableRoles, optimizer: torch.optim.Optimizer) -> RunState:
    """Read a checkpoint's weights and optimizer state into bank and optimizer, bit for bit. DataError when they don't fit."""
    try:
        load_weights(checkpoint, bank, trained)
        _restore_optimizer(optimizer, _names(bank, trained), load_file(checkpoint / "optimizer.safetensors"))
        return RunState.from_dict(json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"resume: {checkpoint} doesn't fit this config ({error}). Resume with the config the run was started with."
        ) from error


def load_weights(folder: Path, bank: AdapterBank, trained: TrainableRoles) -> None:
    """Read the weights that `save_weights` wrote into the bank. DataError when they don't fit these roles."""
    try:
        _fill(bank.tensors(trained.policy), load_file(folder / "policy" / "adapter_model.safetensors"))
        home = trained.value_home(bank)
        if trained.value_adapter:
            _fill(home.tensors(trained.value_adapter), load_file(folder / "value" / "adapter_model.safetensors"))
        if trained.value_head:
            _fill(_head_tensors(home, trained.value_head), load_file(folder / "heads.safetensors"))
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(
            f"resume: {folder} doesn't fit this config ({error}). Resume with the config the run was started with."
        ) from error


def load_policy(folder: Path, bank: AdapterBank, name: str) -> None:
    """Put the policy that `save_weights`, or the end of a run, wrote into `folder` on the bank, frozen. DataError when it doesn't fit.

    The bank's base is taken for the run's own: on a prepared base an adapter's file names none that could be compared.
    """
    files = read_adapter(folder, "policy")
    bank.add(name, peft_adapters.config_of(files, bank.linears, "policy"), trainable=False)
    try:
        _fill(bank.tensors(name), load_file(files.weights))
    except (OSError, SafetensorError, ValueError) as error:
        bank.remove(name)
        raise DataError(
            f"policy: {folder} doesn't fit this base ({error}). Restore the base that the run was made on."
        ) from error


def _names(bank: AdapterBank, trained: TrainableRoles) -> dict[Tensor, str]:
    return {
        p: f"{role}/{name}" for role, parameters in trained.parameters(bank).items() for name, p in parameters.items()
    }


def _head_tensors(bank: AdapterBank, head: str) -> dict[str, Tensor]:
    return {f"value.{name}": p.data for name, p in bank.heads[head].named_parameters()}


@torch.no_grad()
def _fill(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    if set(tensors) != set(saved):
        raise ValueError(f"its tensors have other names, first: {sorted(set(tensors) ^ set(saved))[:2]}")
    for name, tensor in tensors.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(f"{name} is {list(saved[name].shape)}, here {list(tensor.shape)}")
        tensor.copy_(saved[name])


def _optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    return {
        f"{names[parameter]}|{key}": value.detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    optimizer.state.clear()
    for parameter, name in names.items():
        state = {key.split("|")[1]: value for key, value in tensors.items() if key.split("|")[0] == name}
        for key, value in state.items():
            optimizer.state[parameter][key] = value.clone() if key == "step" else value.to(parameter.device).clone()
