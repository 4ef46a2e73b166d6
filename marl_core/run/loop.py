"""The run around the algorithm: which prompts come next, when to evaluate, save and resume."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from marl_core.bank.out_of_memory import memory_told
from marl_core.errors import ConfigError, DataError, Stopped, warn
from marl_core.ppo.types import Evaluation, Prompts, RunResult, StepStats
from marl_core.run.evaluate import evaluate
from marl_core.run.signals import StopRequest
from marl_core.store import checkpoint, strategy_state
from marl_core.store.disk_space import MOST_FAILURES, SaveFailed, save_failed, warn_if_short

if TYPE_CHECKING:
    from marl_core.run.runner import Runner


def steps(runner: Runner) -> Iterator[StepStats]:
    """Run the remaining steps, handing out each one's numbers; checkpoints and evaluations are made on the way.

    An iterator that is given up ends the run for its observers; asked for again, it goes on where it was.
    """
    with runner.audience.until_the_end(runner):
        yield from _steps(runner)


def _steps(runner: Runner) -> Iterator[StepStats]:
    config = runner.config
    runner.prepare()
    runner.audience.begin(runner)
    warn_if_short(runner)
    if runner.done == 0:
        evaluation(runner)
    failed = 0
    while runner.done < config.ppo.steps:
        if runner.folder is not None:
            runner.folder.hold()
        stats = runner.step(prompts(runner))
        last = runner.done == config.ppo.steps
        if config.eval.every and runner.done % config.eval.every == 0 and not last:
            evaluation(runner)
        if last or (config.run.checkpoint_every and runner.done % config.run.checkpoint_every == 0):
            failed = 0 if _saved(runner, failed) else failed + 1
        yield stats


def train(runner: Runner) -> RunResult:
    """Run to the end: steps, last evaluation, final adapter, observers' farewell.

    Ctrl-C and SIGTERM end it after the step they came in, with a checkpoint: `Stopped` is raised then.
    """
    try:
        with runner.audience.until_the_end(runner), StopRequest() as asked:
            last: StepStats | None = None
            for stats in _steps(runner):
                last = stats
                number = int(runner.ranks.largest([asked.signal or 0])[0])  # a signal to one rank stops all
                if number:
                    raise _stopped(runner, signal.Signals(number))
            return _finish(runner, last)
    finally:
        runner.plan.release()
        if runner.folder is not None:
            runner.folder.release()


def _finish(runner: Runner, last: StepStats | None) -> RunResult:
    if runner.folder is not None:
        runner.folder.hold()
    after = evaluation(runner)
    if runner.folder is not None:
        try:
            runner.folder.finish(runner)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"final: {runner.folder.path / 'final'} could not be written ({error}); the last checkpoint holds the same weights. "
                "Make room on that disk and resume: only this is left to do."
            ) from error
        runner.folder.draw()
    runner.ranks.everyone(None)  # nobody leaves before the first rank has written
    before = runner.folder.first_evaluation() if runner.folder is not None else runner.before
    result = RunResult(str(runner.folder.path) if runner.folder else None, runner.done, last, before, after)
    runner.audience.end(runner, result)
    return result


def _stopped(runner: Runner, number: signal.Signals) -> Stopped:
    """Save, unless this very step has been saved, and say how to go on."""
    where = "nothing was saved: this run has no run.folder."
    if runner.folder is not None:
        target = runner.folder.checkpoints / checkpoint.name_of(runner.done)
        saved = target if target.is_dir() and checkpoint.damage(target) is None else save(runner)
        where = f"saved in {saved}. Go on with --resume."
    (where, *_) = runner.ranks.everyone(where)
    return Stopped(f"stopped by {number.name} after step {runner.done}; {where}", number)


def _saved(runner: Runner, failed: int) -> bool:
    """Save. A full disk is a warning, and an error only after it has happened several times in a row."""
    try:
        save(runner)
    except SaveFailed as error:
        if failed + 1 >= MOST_FAILURES:
            raise
        warn(f"{error} Training goes on.")
        return False
    return True


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
    with runner.running(), memory_told("evaluation", runner.config, runner.bank.device.type), runner.asking():
        found = evaluate(runner.plan, runner.roles, runner.heldout, runner.stops, runner.done, runner.ranks)
    runner.before = runner.before or found
    if runner.folder is not None:
        runner.folder.add_evaluation(asdict(found))
    runner.audience.evaluation(runner, found)
    return found


def save(runner: Runner) -> Path | None:
    """Write a checkpoint; None when the run has no folder. SaveFailed when it can't be written: older ones are whole."""
    if runner.folder is None:
        return None
    runner.prepare()
    runner.guards.watch.step_ended(runner.done, thorough=True)
    state = checkpoint.State(runner.done, runner.kl_coef, runner.shaper.state())
    folder, keep = runner.folder.checkpoints, runner.config.run.keep
    runner.folder.hold()
    try:
        runner.folder.flush()
        kept = strategy_state.collect(runner.plan, runner.roles)
        return checkpoint.save(folder, runner.bank, runner.roles.trained, runner.optimizer, state, keep, kept)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise save_failed(runner, folder, error) from error


def resume(runner: Runner) -> None:
    """Put the newest whole checkpoint's state in place; the first rank chooses it, every rank reads it."""
    try:
        _resume(runner)
    except BaseException:  # whoever reads the error keeps this Runner alive, and must not keep its folder
        if runner.folder is not None:
            runner.folder.release()
        raise


def _resume(runner: Runner) -> None:
    if runner.config.run.folder is None:
        raise ConfigError("resume: this config has no run.folder, so there is nothing to resume from.")
    (chosen, *_) = runner.ranks.everyone(_newest(runner))
    if chosen is None:
        return
    if not Path(chosen).is_dir():
        raise DataError(
            f"resume: rank {runner.ranks.rank} finds no {chosen}. Put run.folder on a disk that all processes see."
        )
    state = checkpoint.load(Path(chosen), runner.bank, runner.roles.trained, runner.optimizer)
    strategy_state.restore(Path(chosen), runner.plan, runner.roles)
    runner.done, runner.kl_coef = state.step, state.kl_coef
    runner.shaper.restore(dict(state.shaper))
    if runner.folder is not None:
        runner.folder.go_on_from(runner.done)


def _newest(runner: Runner) -> str | None:
    """The first rank's choice of a checkpoint."""
    if runner.folder is None:
        return None
    runner.folder.refuse_other_inputs(runner)
    found = runner.folder.newest_checkpoint()
    return str(found.resolve()) if found is not None else None
