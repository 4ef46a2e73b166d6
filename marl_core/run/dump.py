"""The batch that a step failed on, with the weights it failed with: safetensors and JSON, to be replayed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from marl_core.config.redact import redact
from marl_core.errors import DataError, MarlError
from marl_core.ppo.types import Prompts, Rollout, ScoredRollout
from marl_core.run import checkpoint
from marl_core.run.files import new_folder, write_json

if TYPE_CHECKING:
    from marl_core.run.runner import Runner

FORMAT = 1
MOST = 20
"""Dumps kept in a run folder; a run that fails again and again doesn't fill the disk."""


@dataclass(frozen=True, slots=True)
class Dump:
    """What was read back: the step and phase that failed, the error's words, and what it worked on."""

    step: int
    phase: str
    message: str
    rows: list[int]
    kl_coef: float
    shaper: dict[str, float]
    rollout: Rollout
    scored: ScoredRollout | None


def dump(runner: Runner, phase: str, rollout: Rollout, scored: ScoredRollout | None, error: MarlError) -> str:
    """Write RUN/dumps/step-NNNNNN-PHASE; a sentence that says where it is and how to replay it. Never raises.

    Nothing is written for a run without a folder, or before its pre-flight check has passed.
    """
    if runner.folder is None or not runner.folder.mine:
        return ""
    folder = runner.folder.path / "dumps" / f"{checkpoint.name_of(runner.done + 1)}-{phase}"
    if not folder.exists() and folder.parent.is_dir() and len(list(folder.parent.iterdir())) >= MOST:
        return f" Not dumped: {folder.parent} holds {MOST} dumps already."
    try:
        with new_folder(folder) as temporary:
            checkpoint.save_weights(temporary, runner.bank, runner.roles.trained)
            save_file(_tensors(rollout, scored), temporary / "batch.safetensors")
            write_json(temporary / "dump.json", _words(runner, phase, rollout, error))
    except (OSError, SafetensorError, TypeError, ValueError, RuntimeError) as failure:
        return f" The batch could not be dumped ({failure})."
    return f" The batch is in {folder}; try it again with: marl replay {folder}"


def load(folder: Path) -> Dump:
    """Read a dump; DataError when it is missing or damaged."""
    try:
        words: dict[str, Any] = json.loads((folder / "dump.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "batch.safetensors")
        if words["format"] != FORMAT:
            raise ValueError(f"format {words['format']}, expected {FORMAT}")
        rollout = _rollout(words, tensors)
        return Dump(
            words["step"],
            words["phase"],
            words["message"],
            words["minibatch"],
            words["kl_coef"],
            words["shaper"],
            rollout,
            _scored(rollout, tensors),
        )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"replay: {folder} is no whole dump ({error}). Give a folder RUN/dumps/step-NNNNNN-PHASE that a run wrote."
        ) from error


def _words(runner: Runner, phase: str, rollout: Rollout, error: MarlError) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": runner.done + 1,
        "phase": phase,
        "error": type(error).__name__,
        "message": redact(str(error)),
        "minibatch": list(getattr(error, "rows", [])),
        "last_plugin": runner.guards.watch.last,
        "kl_coef": runner.kl_coef,
        "shaper": runner.shaper.state(),
        "rows": [_plain(dict(row)) for row in rollout.prompts.rows],
        "prompts": _plain(list(rollout.prompts.texts)),
        "responses": list(rollout.texts),
        "min_tokens": rollout.min_tokens,
        "stops": list(rollout.stops),
    }


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; anything else becomes its text."""
    return json.loads(json.dumps(value, ensure_ascii=False, default=str))


def _tensors(rollout: Rollout, scored: ScoredRollout | None) -> dict[str, Tensor]:
    found: dict[str, Tensor | None] = {
        "prompt_ids": rollout.prompts.ids,
        "prompt_mask": rollout.prompts.mask,
        "ids": rollout.ids,
        "mask": rollout.mask,
        "finished": rollout.finished,
    }
    if scored is not None:
        found |= {name: getattr(scored, name) for name in SCORED}
        found |= {f"part/{name}": part for name, part in scored.parts.items()}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in found.items() if tensor is not None}


SCORED = ("logprobs", "ref_logprobs", "values", "scores", "raw_scores", "entropy")


def _rollout(words: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Rollout:
    prompts = Prompts(tensors["prompt_ids"], tensors["prompt_mask"], words["rows"], words["prompts"])
    return Rollout(
        prompts,
        tensors["ids"],
        tensors["mask"],
        words["responses"],
        tensors["finished"],
        words["min_tokens"],
        tuple(words["stops"]),
    )


def _scored(rollout: Rollout, tensors: Mapping[str, Tensor]) -> ScoredRollout | None:
    if "logprobs" not in tensors:
        return None
    found = {name: tensors.get(name) for name in SCORED}
    parts = {name.removeprefix("part/"): value for name, value in tensors.items() if name.startswith("part/")}
    return ScoredRollout(rollout=rollout, parts=parts, **found)  # type: ignore[arg-type]  # the two that are required are there


def to_device(scored: ScoredRollout, device: torch.device) -> ScoredRollout:
    """The same on another device."""
    moved = {name: value.to(device) for name in SCORED if (value := getattr(scored, name)) is not None}
    parts = {name: part.to(device) for name, part in scored.parts.items()}
    return ScoredRollout(**{**dict.fromkeys(SCORED), **moved}, rollout=scored.rollout.to(device), parts=parts)
