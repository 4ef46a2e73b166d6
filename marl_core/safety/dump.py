"""The batch that a step failed on, with the weights it failed with: safetensors and JSON, to be replayed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from marl_core.config.redact import redact
from marl_core.errors import DataError, MarlError, NumericError, PluginError
from marl_core.ppo.rewards import own_scores
from marl_core.ppo.step import Step
from marl_core.ppo.types import Advantages, Prompts, Rollout, ScoredRollout
from marl_core.safety.plugin_guard import PluginGuard
from marl_core.store import checkpoint
from marl_core.store.files import new_folder, write_json
from marl_core.store.run_state import RunState

FORMAT = 2
SHAPED_AS_SCORES = 1
"""The format in which `scores` were the shaped ones, and the others `raw_scores`."""
DUMPS_KEPT = 20
"""Dumps kept in a run folder; a run that fails again and again doesn't fill the disk."""


@dataclass(frozen=True, slots=True)
class Dump:
    """What was read back: the state before the step that failed, its phase, the error's words, and what it worked on."""

    state: RunState
    phase: str
    message: str
    rows: list[int]
    """Of the minibatch that failed, where one did."""
    rollout: Rollout
    scored: ScoredRollout | None
    advantages: Advantages | None = None
    """Advantages of one's own; None when the config's estimator gave them."""
    own_scores: Tensor | None = None
    """Scores of one's own, [B] or [B, T]; None when the configured reward gives them."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of a step and what it works on: the rollout, its scores once it has them, and what the caller gave of his own."""

    name: str
    rollout: Rollout
    scored: ScoredRollout | None = None
    own: object = None
    """Scores or advantages that the caller gave instead of what the config would give."""


@contextmanager
def dump_on_error(folder: Path | None, step: Step, state: RunState, phase: Phase, guard: PluginGuard) -> Iterator[None]:
    """A phase of a step: when numbers or a plugin fail in it, what it worked on is dumped, and the error says where.

    `folder`: the run's folder; None for a run that has none yet.
    """
    try:
        yield
    except (NumericError, PluginError) as error:
        note = "" if folder is None else dump(folder, step, state, phase, error, guard.last)
        error.args = (f"{error}{note}",)
        raise


def dump(folder: Path, step: Step, state: RunState, phase: Phase, error: MarlError, last_plugin: str = "none") -> str:
    """Write RUN/dumps/step-NNNNNN-PHASE; a sentence that says where it is and how to replay it. Never raises."""
    place = folder / "dumps" / f"{checkpoint.name_of(state.step + 1)}-{phase.name}"
    if not place.exists() and place.parent.is_dir() and len(list(place.parent.iterdir())) >= DUMPS_KEPT:
        return f" Not dumped: {place.parent} holds {DUMPS_KEPT} dumps already."
    try:
        with new_folder(place) as temporary:
            checkpoint.save_weights(temporary, step.bank, step.roles.trained)
            tensors = {**_tensors(phase.rollout, phase.scored), **_own(step, state, phase)}
            save_file(_still(tensors), temporary / "batch.safetensors")
            write_json(temporary / "dump.json", _json(state, phase, error, last_plugin))
    except (OSError, SafetensorError, TypeError, ValueError, RuntimeError) as failure:
        return f" The batch could not be dumped ({failure})."
    return f" The batch is in {place}; try it again with: marl replay {place}"


def load(folder: Path) -> Dump:
    """Read a dump; DataError when it is missing or damaged."""
    try:
        words: dict[str, Any] = json.loads((folder / "dump.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "batch.safetensors")
        if words["format"] not in (SHAPED_AS_SCORES, FORMAT):
            raise ValueError(f"format {words['format']}, expected {FORMAT}")
        if words["format"] == SHAPED_AS_SCORES and "scores" in tensors:
            shaped = tensors.pop("scores")
            tensors |= {"shaped_scores": shaped, "scores": tensors.pop("raw_scores", shaped)}
        rollout = _rollout(words, tensors)
        return Dump(
            state=RunState.from_dict({**words, "step": words["step"] - 1}),
            phase=words["phase"],
            message=words["message"],
            rows=words["minibatch"],
            rollout=rollout,
            scored=_scored(rollout, tensors),
            advantages=_advantages(tensors),
            own_scores=tensors.get(OWN_SCORES),
        )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"replay: {folder} is no whole dump ({error}). Give a folder RUN/dumps/step-NNNNNN-PHASE that a run wrote."
        ) from error


def _json(state: RunState, phase: Phase, error: MarlError, last_plugin: str) -> dict[str, Any]:
    rollout = phase.rollout
    return {
        "format": FORMAT,
        **state.as_dict(),
        "step": state.step + 1,
        "phase": phase.name,
        "error": type(error).__name__,
        "message": redact(str(error)),
        "minibatch": list(getattr(error, "rows", [])),
        "last_plugin": last_plugin,
        "rows": [_plain(dict(row)) for row in rollout.prompts.rows],
        "prompts": _plain(list(rollout.prompts.texts)),
        "responses": list(rollout.texts),
        "min_tokens": rollout.min_tokens,
        "stops": list(rollout.stops),
    }


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; anything else becomes its text."""
    return json.loads(json.dumps(value, ensure_ascii=False, default=str))


def _own(step: Step, state: RunState, phase: Phase) -> dict[str, Tensor]:
    """What the caller gave and a replay couldn't compute. Usual advantages are left out: other settings may be tried on them."""
    own = phase.own
    if isinstance(own, Advantages):
        usual = _usual(step, state, phase.scored)
        mine = _flat(own)
        if mine.keys() == usual.keys() and all(torch.equal(mine[name], usual[name]) for name in mine):
            return {}
        return {f"{ADVANTAGES}{name}": tensor for name, tensor in mine.items()}
    if own is None:
        return {}
    scores = own_scores(own, phase.rollout)
    return {OWN_SCORES: scores.total if scores.tokens is None else scores.tokens}


def _usual(step: Step, state: RunState, scored: ScoredRollout | None) -> dict[str, Tensor]:
    try:
        return {} if scored is None else _flat(step.advantages(scored, state.kl_coef))
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
