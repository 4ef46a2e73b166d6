"""The run around the algorithm: which prompts come next, when to evaluate, save and resume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from marl_core.errors import ConfigError
from marl_core.ppo.types import Evaluation, Prompts, RunResult, StepStats
from marl_core.run import checkpoint
from marl_core.run.evaluate import evaluate

if TYPE_CHECKING:
    from marl_core.run.runner import Runner


def steps(runner: Runner) -> Iterator[StepStats]:
    """Run the remaining steps, handing out each one's numbers; checkpoints and evaluations are made on the way."""
    config = runner.config
    runner.prepare()
    if runner.done == 0:
        evaluation(runner)
    while runner.done < config.ppo.steps:
        stats = runner.step(prompts(runner))
        last = runner.done == config.ppo.steps
        if config.eval.every and runner.done % config.eval.every == 0 and not last:
            evaluation(runner)
        if config.run.checkpoint_every and (runner.done % config.run.checkpoint_every == 0 or last):
            runner.save()
        yield stats


def train(runner: Runner) -> RunResult:
    """Run to the end: steps, last evaluation, final adapter, observers' farewell."""
    last: StepStats | None = None
    for stats in steps(runner):
        last = stats
    after = evaluation(runner)
    if runner.folder is not None:
        runner.folder.finish(runner)
    before = runner.folder.first_evaluation() if runner.folder is not None else runner.before
    result = RunResult(str(runner.folder.path) if runner.folder else None, runner.done, last, before, after)
    runner.plan.hooks.run_end(result)
    return result


def prompts(runner: Runner) -> Prompts:
    """The next step's prompts."""
    config = runner.config
    if runner.data is None or config.data is None:
        raise ConfigError(
            "data: this config names no prompts, so there is nothing to run on. Add data.prompts, or call step(prompts)."
        )
    count = config.ppo.batch // config.ppo.samples_per_prompt
    return runner.data.batch(runner.done, count, config.run.seed, config.data.shuffle)


def evaluation(runner: Runner) -> Evaluation | None:
    """Evaluate on the held-out prompts and append it to the run folder."""
    if runner.heldout is None:
        return None
    found = evaluate(runner.plan, runner.roles, runner.heldout, runner.stops, runner.done)
    runner.before = runner.before or found
    if runner.folder is not None:
        runner.folder.add_evaluation(asdict(found))
    return found


def save(runner: Runner) -> Path | None:
    """Write a checkpoint; None when the run has no folder."""
    if runner.folder is None:
        return None
    runner.prepare()
    state = checkpoint.State(runner.done, runner.kl_coef, runner.shaper.state())
    return checkpoint.save(
        runner.folder.checkpoints,
        runner.bank,
        runner.roles.trained,
        runner.optimizer,
        state,
        keep=runner.config.run.keep,
    )


def resume(runner: Runner) -> None:
    """Put the newest whole checkpoint's state in place."""
    if runner.folder is None:
        raise ConfigError("resume: this config has no run.folder, so there is nothing to resume from.")
    if not runner.override:
        runner.folder.refuse_other_inputs(runner)
    found = runner.folder.newest_checkpoint()
    if found is None:
        return
    state = checkpoint.load(found, runner.bank, runner.roles.trained, runner.optimizer)
    runner.done, runner.kl_coef = state.step, state.kl_coef
    runner.shaper.restore(dict(state.shaper))
    runner.folder.rewind(runner.done)
