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

from marl_core.config.flatten import flatten
from marl_core.config.redact import redact
from marl_core.config.yaml_text import parse_yaml
from marl_core.errors import ConfigError, DataError, MarlError, NumericError, PluginError, tell_beside
from marl_core.ppo.rewards import own_scores
from marl_core.ppo.step import Step
from marl_core.ppo.types import Advantages, Prompts, Rollout, ScoredRollout
from marl_core.registry.callables import is_of_a_program
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
    """A dump as read back: the state before the failed step, the phase, the error's message, and the phase's data."""

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
    """A phase of a step and its data: the rollout, its scores once it has them, and what the caller gave instead of the config."""

    name: str
    rollout: Rollout
    scored: ScoredRollout | None = None
    own: object = None
    """The caller's own scores or advantages; None when the config gives them."""


@contextmanager
def dump_on_error(folder: Path | None, step: Step, state: RunState, phase: Phase, guard: PluginGuard) -> Iterator[None]:
    """A block that is one phase of a step: on a NumericError or PluginError its data is dumped, and the error says where.

    `folder`: the run's folder; None for a run that has none yet.
    """
    try:
        yield
    except (NumericError, PluginError) as error:
        tell_beside(error, "" if folder is None else dump(folder, step, state, phase, error, guard.last))
        raise


def dump(folder: Path, step: Step, state: RunState, phase: Phase, error: MarlError, last_plugin: str = "none") -> str:
    """Write RUN/dumps/step-NNNNNN-PHASE; return a sentence that says where it is and how to replay it, or why there is none."""
    path = folder / "dumps" / f"{checkpoint.name_of(state.step + 1)}-{phase.name}"
    if not path.exists() and path.parent.is_dir() and len(list(path.parent.iterdir())) >= DUMPS_KEPT:
        return f"Not dumped: {path.parent} holds {DUMPS_KEPT} dumps already."
    try:
        with new_folder(path) as temporary:
            checkpoint.save_weights(temporary, step.bank, step.roles.trained)
            tensors = {**_tensors(phase.rollout, phase.scored), **_caller_tensors(step, state, phase)}
            save_file(_cpu_copies(tensors), temporary / "batch.safetensors")
            write_json(temporary / "dump.json", _json(state, phase, error, last_plugin))
    except (OSError, SafetensorError, TypeError, ValueError, RuntimeError) as failure:
        return f"The batch could not be dumped ({failure})."
    if _starts_from_a_file(folder):
        return f"The batch is in {path}; try it again with `marl replay {path}`."
    call = f"replay({str(path)!r}, config)"
    return f"The batch is in {path}; try it again in this program, which has the function or object: {call}, from marl_core.run.replay."


def _starts_from_a_file(folder: Path) -> bool:
    """Whether the run's config says all: objects and functions of a Python program stand in it by names that lead to nothing elsewhere."""
    try:
        keys = flatten(parse_yaml((folder / "config.yaml").read_text(encoding="utf-8"), "config.yaml"))
    except (OSError, ConfigError, UnicodeDecodeError):
        return True
    return not any(is_of_a_program(key, value) for key, value in keys.items())


def load(folder: Path) -> Dump:
    """Read a dump; DataError when it is missing or damaged."""
    try:
        record: dict[str, Any] = json.loads((folder / "dump.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "batch.safetensors")
        if record["format"] not in (SHAPED_AS_SCORES, FORMAT):
            raise ValueError(f"format {record['format']}, expected {FORMAT}")
        if record["format"] == SHAPED_AS_SCORES and "scores" in tensors:
            shaped = tensors.pop("scores")
            tensors |= {"shaped_scores": shaped, "scores": tensors.pop("raw_scores", shaped)}
        rollout = _rollout(record, tensors)
        return Dump(
            state=RunState.from_dict({**record, "step": record["step"] - 1}),
            phase=record["phase"],
            message=record["message"],
            rows=record["minibatch"],
            rollout=rollout,
            scored=_scored(rollout, tensors),
            advantages=_advantages(tensors),
            own_scores=tensors.get(OWN_SCORES_KEY),
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


def _caller_tensors(step: Step, state: RunState, phase: Phase) -> dict[str, Tensor]:
    """The caller's own scores or advantages. Those that the config's estimator gives too are left out: a replay computes them."""
    own = phase.own
    if isinstance(own, Advantages):
        usual = _estimator_advantages(step, state, phase.scored)
        tensors = _tensor_fields(own)
        if tensors.keys() == usual.keys() and all(torch.equal(tensors[name], usual[name]) for name in tensors):
            return {}
        return {f"{ADVANTAGES_PREFIX}{name}": tensor for name, tensor in tensors.items()}
    if own is None:
        return {}
    scores = own_scores(own, phase.rollout)
    return {OWN_SCORES_KEY: scores.total if scores.tokens is None else scores.tokens}


def _estimator_advantages(step: Step, state: RunState, scored: ScoredRollout | None) -> dict[str, Tensor]:
    try:
        return {} if scored is None else _tensor_fields(step.advantages(scored, state.kl_coef))
    except (MarlError, RuntimeError, ValueError):
        return {}


def _tensors(rollout: Rollout, scored: ScoredRollout | None) -> dict[str, Tensor]:
    tensors = {
        "prompt_ids": rollout.prompts.ids,
        "prompt_mask": rollout.prompts.mask,
        "ids": rollout.ids,
        "mask": rollout.mask,
        "finished": rollout.finished,
    }
    if scored is not None:
        tensors |= _tensor_fields(scored) | {f"{PART_PREFIX}{name}": part for name, part in scored.parts.items()}
    return tensors


def _cpu_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


PART_PREFIX, ADVANTAGES_PREFIX, OWN_SCORES_KEY = "part/", "advantages/", "own_scores"


def _tensor_fields(value: Any) -> dict[str, Tensor]:
    """The tensors among a dataclass's fields, whichever it has."""
    values = {item.name: getattr(value, item.name) for item in fields(value)}
    return {name: tensor for name, tensor in values.items() if isinstance(tensor, Tensor)}


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _rollout(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Rollout:
    prompts = Prompts(tensors["prompt_ids"], tensors["prompt_mask"], record["rows"], record["prompts"])
    return Rollout(
        prompts,
        tensors["ids"],
        tensors["mask"],
        record["responses"],
        tensors["finished"],
        record["min_tokens"],
        tuple(record["stops"]),
    )


def _scored(rollout: Rollout, tensors: Mapping[str, Tensor]) -> ScoredRollout | None:
    """Every tensor that the dump holds of it; what an older dump lacks is absent."""
    if "logprobs" not in tensors:
        return None
    needed: dict[str, Any] = {name: tensors.get(name) for name in ("logprobs", "ref_logprobs", "values", "scores")}
    names = {item.name for item in fields(ScoredRollout)} - {"rollout", "parts"} - needed.keys()
    more: dict[str, Any] = {name: tensors[name] for name in names if name in tensors}
    return ScoredRollout(rollout=rollout, parts=_with_prefix(tensors, PART_PREFIX), **needed, **more)


def _advantages(tensors: Mapping[str, Tensor]) -> Advantages | None:
    values: dict[str, Any] = _with_prefix(tensors, ADVANTAGES_PREFIX)
    return Advantages(**{"returns": None, **values}) if values else None
