"""Replay of a dump: the same batch, the same weights, the phase that failed once more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from marl_core.config.load import load_config
from marl_core.config.run_config import RunConfig
from marl_core.errors import DataError, MarlError
from marl_core.ppo import role_scoring
from marl_core.ppo.estimators import estimate_advantages
from marl_core.ppo.seeds import generator, seeded
from marl_core.ppo.update import Batch, update_epochs
from marl_core.run.optimizer import learning_rate_factor
from marl_core.run.runner import Runner
from marl_core.safety.dump import Dump, load, to_device
from marl_core.store import checkpoint


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay found: the error of then, the error of now (None when the phase passes), and numbers in words."""

    step: int
    phase: str
    then: str
    now: MarlError | None
    detail: str


def replay(folder: Path | str, config: RunConfig | None = None, *, sets: Iterable[str] = ()) -> Replayed:
    """Repeat the phase that failed, on the dumped batch with the dumped weights. Nothing is written.

    `config` is the run's own, changed by `sets`, unless one is given: to try a repaired reward or another setting.
    """
    place = Path(folder).expanduser()
    found = load(place)
    asked = config or load_config(place.resolve().parent.parent / "config.yaml", sets, env={})
    runner = Runner(without_folder(asked))
    checkpoint.load_weights(place, runner.bank, runner.roles.trained)
    runner.done, runner.kl_coef = found.step - 1, found.kl_coef
    runner.shaper.restore(found.shaper)
    try:
        with runner.running():
            detail = {"score": _score, "update": _update}[found.phase](runner, found)
    except MarlError as error:
        return Replayed(found.step, found.phase, found.message, error, "")
    return Replayed(found.step, found.phase, found.message, None, detail)


def without_folder(config: RunConfig) -> RunConfig:
    """The same run, writing nothing and watched by nobody."""
    return config.model_copy(update={"run": config.run.model_copy(update={"folder": None}), "observers": []})


def _score(runner: Runner, dump: Dump) -> str:
    scores = runner.score(dump.rollout, dump.own_scores).scores
    return f"{len(scores)} responses were scored, mean {float(scores.mean()):.6g}"


def _update(runner: Runner, dump: Dump) -> str:
    """The minibatch that failed, by itself: its loss and gradient with the weights of that moment."""
    if dump.scored is None:
        raise DataError("replay: this dump holds no scores, so there is no update to repeat.")
    scored, config, device = to_device(dump.scored, runner.bank.device), runner.config, runner.bank.device
    own = None if dump.advantages is None else to_device(dump.advantages, device)
    batch = Batch(scored, own or estimate_advantages(scored, config.ppo, dump.kl_coef, runner.plan.estimator))
    rows = torch.tensor(dump.rows) if dump.rows else torch.arange(len(scored.rollout))
    ppo = config.ppo.model_copy(update={"epochs": 1, "minibatch": len(rows)} if dump.rows else {"epochs": 1})
    for group in runner.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * learning_rate_factor(runner.done, config.ppo)
    with seeded(device, config.run.seed, "dropout", runner.done, *runner.ranks.salt):
        stats = update_epochs(
            runner.bank,
            runner.roles.trained,
            batch.select(rows),
            runner.optimizer,
            ppo,
            temperature=config.sampling.temperature,
            kl_coef=dump.kl_coef,
            generator=generator("replay"),
            tokens=role_scoring.token_budget(config, runner.bank),
        )
    runner.guards.updated(runner, stats)
    return f"{len(rows)} rows: policy loss {stats.policy_loss:.6g}, gradient norm {stats.policy_grad_norm:.6g}"
