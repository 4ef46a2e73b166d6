"""The batch that a step failed on, with the weights it failed with: safetensors and JSON, to be replayed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from marl_core.config.redact import redact
from marl_core.errors import DataError, MarlError
from marl_core.ppo.estimators import estimate_advantages
from marl_core.ppo.scoring import own_scores
from marl_core.ppo.types import Advantages, Prompts, Rollout, ScoredRollout
from marl_core.store import checkpoint
from marl_core.store.files import new_folder, write_json

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
    advantages: Advantages | None = None
    """Advantages of one's own; None when the config's estimator gave them."""
    own_scores: Tensor | None = None
    """Scores of one's own, [B] or [B, T]; None when the configured reward gives them."""


def dump(
    runner: Runner,
    phase: str,
    rollout: Rollout,
    scored: ScoredRollout | None,
    error: MarlError,
    own: object = None,
) -> str:
    """Write RUN/dumps/step-NNNNNN-PHASE; a sentence that says where it is and how to replay it. Never raises.

    `own`: what the caller gave instead of what the config would give, scores or advantages.
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
            tensors = {**_tensors(rollout, scored), **_own(runner, rollout, scored, own)}
            save_file(_still(tensors), temporary / "batch.safetensors")
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
            _advantages(tensors),
            tensors.get(OWN_SCORES),
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


def _own(runner: Runner, rollout: Rollout, scored: ScoredRollout | None, own: object) -> dict[str, Tensor]:
    """What the caller gave and a replay couldn't compute. Usual advantages are left out: other settings may be tried on them."""
    if isinstance(own, Advantages):
        usual = _usual(runner, scored)
        mine = _flat(own)
        if mine.keys() == usual.keys() and all(torch.equal(mine[name], usual[name]) for name in mine):
            return {}
        return {f"{ADVANTAGES}{name}": tensor for name, tensor in mine.items()}
    if own is None:
        return {}
    scores = own_scores(own, rollout)
    return {OWN_SCORES: scores.total if scores.tokens is None else scores.tokens}


def _usual(runner: Runner, scored: ScoredRollout | None) -> dict[str, Tensor]:
    try:
        estimator = runner.plan.estimator
        return (
            {} if scored is None else _flat(estimate_advantages(scored, runner.config.ppo, runner.kl_coef, estimator))
        )
    except (MarlError, RuntimeError, ValueError):
        return {}


def _tensors(rollout: Rollout, scored: ScoredRollout | None) -> dict[str, Tensor]:
    found = {
        "prompt_ids": rollout.prompts.ids,
        "prompt_mask": rollout.prompts.mask,
        "ids": rollout.ids,
        "mask": rollout.mask,
        "finished": rollout.finished,
    }
    if scored is not None:
        found |= _flat(scored) | {f"{PART}{name}": part for name, part in scored.parts.items()}
    return found


def _still(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


PART, ADVANTAGES, OWN_SCORES = "part/", "advantages/", "own_scores"


def _flat(value: Any) -> dict[str, Tensor]:
    """The tensors among a dataclass's fields, whichever it has."""
    found = {item.name: getattr(value, item.name) for item in fields(value)}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _under(tensors: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    return {name.removeprefix(place): tensor for name, tensor in tensors.items() if name.startswith(place)}


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
    """Every tensor that the dump holds of it; what an older dump lacks is absent."""
    if "logprobs" not in tensors:
        return None
    needed: dict[str, Any] = {name: tensors.get(name) for name in ("logprobs", "ref_logprobs", "values", "scores")}
    names = {item.name for item in fields(ScoredRollout)} - {"rollout", "parts"} - needed.keys()
    more: dict[str, Any] = {name: tensors[name] for name in names if name in tensors}
    return ScoredRollout(rollout=rollout, parts=_under(tensors, PART), **needed, **more)


def _advantages(tensors: Mapping[str, Tensor]) -> Advantages | None:
    found: dict[str, Any] = _under(tensors, ADVANTAGES)
    return Advantages(**{"returns": None, **found}) if found else None


Numbers = TypeVar("Numbers", ScoredRollout, Advantages)


def to_device(numbers: Numbers, device: torch.device) -> Numbers:
    """The same on another device: every field that has tensors."""
    return replace(numbers, **{item.name: _moved(getattr(numbers, item.name), device) for item in fields(numbers)})


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {name: _moved(part, device) for name, part in value.items()}
    return value.to(device) if isinstance(value, Tensor | Rollout) else value
