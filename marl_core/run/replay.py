"""Replay of a dump: the same batch, the same weights, the phase that failed once more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from marl_core.config.load import load_config
from marl_core.config.run_config import RunConfig
from marl_core.errors import DataError, MarlError
from marl_core.ppo.seeds import generator
from marl_core.run.runner import Runner
from marl_core.safety.dump import Dump, load
from marl_core.store import checkpoint


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay gave: the message of the dumped error, the error raised now (None when the phase passes), numbers as text."""

    step: int
    phase: str
    then: str
    now: MarlError | None
    detail: str


def replay(folder: Path | str, config: RunConfig | None = None, *, sets: Iterable[str] = ()) -> Replayed:
    """Repeat the phase that failed, on the dumped batch with the dumped weights. Nothing is written.

    DataError when the folder holds no dump, or its weights don't fit the config.

    `config` is the run's own, changed by `sets`, unless one is given: to try a repaired reward or another setting.
    """
    path = Path(folder).expanduser()
    dumped = load(path)
    run_config = config or load_config(path.resolve().parent.parent / "config.yaml", sets, env={})
    runner = Runner(without_folder(run_config))
    checkpoint.load_weights(path, runner.bank, runner.roles.trained)
    runner.state = dumped.state
    failure = (dumped.state.step + 1, dumped.phase, dumped.message)
    try:
        with runner.running():
            detail = {"score": _score, "update": _update}[dumped.phase](runner, dumped)
    except MarlError as error:
        return Replayed(*failure, error, "")
    return Replayed(*failure, None, detail)


def without_folder(config: RunConfig) -> RunConfig:
    """The same run, writing nothing and watched by nobody."""
    return config.model_copy(update={"run": config.run.model_copy(update={"folder": None}), "observers": []})


def _score(runner: Runner, dump: Dump) -> str:
    scores = runner.score(dump.rollout, dump.own_scores).shaped_scores
    return f"{len(scores)} responses were scored, mean {float(scores.mean()):.6g}"


def _update(runner: Runner, dump: Dump) -> str:
    """The minibatch that failed, by itself: its loss and gradient with the weights of that moment."""
    if dump.scored is None:
        raise DataError("replay: this dump holds no scores, so there is no update to repeat.")
    step, device = runner.algorithm, runner.bank.device
    scored = dump.scored.to(device)
    dumped = dump.advantages
    advantages = step.advantages(scored, dump.state.kl_coef) if dumped is None else dumped.to(device)
    rows = torch.tensor(dump.rows) if dump.rows else torch.arange(len(scored.rollout))
    once = {"epochs": 1, "minibatch": len(rows)} if dump.rows else {"epochs": 1}
    stats = runner.train_on(
        scored.select(rows),
        advantages.select(rows),
        generator("replay"),
        replace(step, ppo=step.ppo.model_copy(update=once)),
    )
    return f"{len(rows)} rows: policy loss {stats.policy_loss:.6g}, gradient norm {stats.policy_grad_norm:.6g}"
