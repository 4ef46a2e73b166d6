"""Runner: a run from start to end. `step` reads like the algorithm on paper; its parts can be called by hand."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.out_of_memory import memory_told
from marl_core.bank.room import position_limit, vocabulary_of
from marl_core.config.device import device_of
from marl_core.config.run_config import RunConfig
from marl_core.config.speed_config import is_on
from marl_core.data.given_prompts import GivenPrompts, encode_prompts
from marl_core.data.reading import UNBOUNDED_ROOM
from marl_core.errors import RESUME, ConfigError, DataError, MarlError, Stopped, in_words, tell_beside, warn
from marl_core.logs import LOADING, PREFLIGHT, RUN, logger
from marl_core.parallel.process_group import join
from marl_core.parallel.rank_consistency import require_same_start, trained_tensors
from marl_core.plan.plan import Plan
from marl_core.ppo.budget import Budget
from marl_core.ppo.metrics import step_stats
from marl_core.ppo.objectives import adapt_kl_coef, masked_sum
from marl_core.ppo.progress import listening, phase
from marl_core.ppo.reward_context import RewardContext, asking
from marl_core.ppo.roles import Roles
from marl_core.ppo.sampling.sampler import PolicySampler
from marl_core.ppo.sampling.stop_tokens import stop_ids
from marl_core.ppo.seeds import derive_seed, generator, seeded
from marl_core.ppo.shaping import learned, shape
from marl_core.ppo.step import Step
from marl_core.ppo.types import (
    Advantages,
    Evaluation,
    Prompts,
    Rollout,
    RunResult,
    ScoredRollout,
    StepStats,
    UpdateStats,
)
from marl_core.registry.catalog import Catalog
from marl_core.report.draw import draw
from marl_core.run.ending import Ending
from marl_core.run.evaluate import evaluate
from marl_core.run.host import default_torch_modes, threads, timed, trim_heap
from marl_core.run.observers import ObserverCalls
from marl_core.run.optimizer import make_optimizer, set_learning_rates
from marl_core.run.prompt_sets import PromptSets
from marl_core.run.roles import BuiltRoles, build_roles
from marl_core.run.signals import StopRequest
from marl_core.safety.dump import Phase, dump_on_error
from marl_core.safety.findings import Preflight
from marl_core.safety.plugin_guard import PluginGuard
from marl_core.safety.preflight import preflight
from marl_core.safety.step_checks import StepChecks, finite_sampling
from marl_core.store import checkpoint, strategy_state
from marl_core.store.disk_space import (
    FAILED_SAVES_ALLOWED,
    SaveFailed,
    checkpoint_bytes,
    save_failed,
    warn_if_short,
)
from marl_core.store.folder import RunFolder
from marl_core.store.provenance import provenance
from marl_core.store.run_state import RunState


class Runner:
    """PPO on one shared base.

    `Runner(config).train()` does everything; `for stats in runner.steps()` hands out each step. For loops of one's own:
    `step(rollout=..., scores=...)`, or its parts `generate`, `score`, `advantages`, `update` and `finish`; `end` ends such a run, and so
    does `with Runner(config) as runner`. Two Runners may share one `bank`, each with a `policy` name.
    """

    def __init__(
        self,
        config: RunConfig | Plan,
        *,
        bank: AdapterBank | None = None,
        policy: str = "policy",
        catalog: Catalog | None = None,
        resume: bool = False,
        override: bool = False,
    ) -> None:
        """Check the config, load the base, build the roles. Nothing is written before the pre-flight check has passed.

        A Plan instead of a config isn't checked again. ConfigError when the config can't work, or its folder can't be used.
        """
        self.plan = _checked(config, catalog).for_run(self)
        self.ranks = join(self.plan.config)
        self.plan = self.plan if self.ranks.first else self.plan.without_observers()
        self.config = config = self.plan.config
        self.override = override
        early = PromptSets.before_weights(self.plan) if bank is None else None
        self.folder = RunFolder.open(config, resume=resume, override=override) if self.ranks.first else None
        with self._folder_kept():
            self._load(policy, bank, resume, early)

    def _load(self, policy: str, bank: AdapterBank | None, resume: bool, early: PromptSets | None) -> None:
        """Base and roles, then all that stands on them; a given bank is as it was when that fails."""
        config = self.config
        self.guard, self.checks, self.observers = PluginGuard(), StepChecks(config), ObserverCalls(self.plan)
        self.plan.hooks.around = self.guard.call
        with default_torch_modes(), threads(config.run.threads), memory_told("loading", config, device_of(config)):
            self.built = build_roles(self.plan, policy, bank)
        try:
            with self.running():
                self._open(self.built, resume, early)
        except BaseException:
            self.built.discard()
            raise

    @contextmanager
    def _folder_kept(self) -> Iterator[None]:
        """A block that comes before the first step. Who reads its error keeps this Runner alive, and must not keep its folder."""
        try:
            yield
        except BaseException:
            if self.folder is not None:
                self.folder.release()
            raise

    def _open(self, built: BuiltRoles, resume: bool, early: PromptSets | None) -> None:
        """The step, data, optimizer and state; then, on resume, the checkpoint."""
        config, bank = self.config, built.bank
        roles = self.guard.wrapped_roles(built.roles)
        self._stops = tuple(
            stop_ids(
                bank.tokenizer, config.sampling, bank.base.generation_config.eos_token_id, vocabulary_of(bank.base)
            )
        )
        self.algorithm = Step(
            bank=bank,
            roles=roles,
            sampler=PolicySampler(
                bank,
                roles.trained.policy,
                config.sampling,
                self._stops,
                config.speed,
                value_head=roles.trained.policy_head,
                options=built.options,
            ),
            budget=Budget.of(config, bank.trunk, built.options, self.ranks.size),
            estimator=self.plan.estimator,
            ppo=config.ppo,
            temperature=config.sampling.temperature,
            ranks=self.ranks,
        )
        prompts = self._prompts(early)
        self.data, self.heldout = prompts.training, prompts.heldout
        if self.data is not None:
            held_out = f", {len(self.heldout)} held out" if self.heldout is not None else ""
            logger(LOADING).info("%d prompts%s", len(self.data), held_out)
        self.optimizer = make_optimizer(roles.trained.parameters(bank), config, built.rates)
        self.state = RunState(kl_coef=config.ppo.kl.coef)
        self.preflight: Preflight | None = None
        self.before: Evaluation | None = None
        self.ending = Ending(self.observers, self.folder, self.plan.hooks, self.ranks)
        self._evaluated: Evaluation | None = None
        self.seconds: dict[str, float] = {}
        self._rollouts = 0
        self._kl_coef_used = self.state.kl_coef
        self._last: StepStats | None = None
        self._result: RunResult | None = None
        self._whole = True  # weights and optimizer are those of the last whole step
        self._scores_learned: torch.Tensor | None = None
        if resume:
            self._read_checkpoint()
        self.guard.start(bank)

    @property
    def bank(self) -> AdapterBank:
        """The shared base with its adapters."""
        return self.built.bank

    @property
    def roles(self) -> Roles:
        """The run's roles on the bank: policy, value, reference, reward sources, judges."""
        return self.algorithm.roles

    @property
    def done(self) -> int:
        """Steps done."""
        return self.state.step

    @property
    def kl_coef(self) -> float:
        """The KL coefficient of the next step."""
        return self.state.kl_coef

    # -- the algorithm --------------------------------------------------------------------------------------

    def step(
        self,
        prompts: Prompts | GivenPrompts | None = None,
        *,
        rollout: Rollout | None = None,
        scores: torch.Tensor | Sequence[float] | None = None,
    ) -> StepStats:
        """One PPO step: on `prompts`, or on a `rollout` at hand, with `scores` of one's own ([B] or [B, T]) or the configured reward's.

        Observers hear of it, and the run folder is written. ConfigError unless either prompts or a rollout is given, and for a config
        without a reward where no scores are given.
        """
        rollout = self._rollout_of(prompts, rollout, scores)
        scored = self.score(rollout, scores)  # policy, reference, value, reward: views of one base
        advantages = self.advantages(scored)
        update = self.update(scored, advantages)
        return self.finish(scored, advantages, update)

    def _rollout_of(self, prompts: Any, rollout: Rollout | None, scores: object) -> Rollout:
        """The rollout that a step is to learn from: the one at hand, or a new one."""
        if (prompts is None) == (rollout is None):
            raise ConfigError(
                "step: give either prompts, which are answered and scored, or rollout= (with scores= of your own, or without)."
            )
        if rollout is not None:
            return rollout
        if scores is not None:
            raise ConfigError(
                "step: scores belong to responses, and those are not sampled yet. Call rollout = runner.generate(prompts), then "
                "runner.step(rollout=rollout, scores=scores)."
            )
        self._require_reward()
        return self.generate(prompts)

    def encode(self, prompts: Prompts | GivenPrompts) -> Prompts:
        """Texts, chats or rows of data as a batch, rendered and tokenized as the config's `data` says, plainly where it says nothing.

        Prompts stay as they are. A text or a chat ([{role, content}, ...]) is a whole prompt; of a row (columns by name) `data.field` or
        `data.prompt_template` makes one. DataError names the entry that can't be a prompt.
        """
        if isinstance(prompts, Prompts):
            return prompts
        return encode_prompts(prompts, self.config.data, self.bank.tokenizer, self._room)

    def rollout(self, prompts: Prompts | GivenPrompts, responses: Sequence[str] | Sequence[Sequence[int]]) -> Rollout:
        """Responses that were not sampled here, one for each of the prompts (texts, chats, rows, Prompts), as a rollout to learn from.

        A text is a whole response, and a stop token is put behind it; token lists are taken as they are, up to their first stop token.
        """
        return Rollout.from_responses(self.encode(prompts), responses, self.bank.tokenizer, self._stops)

    def generate(self, prompts: Prompts | GivenPrompts, limits: torch.Tensor | None = None) -> Rollout:
        """Sample `samples_per_prompt` responses to each prompt from the policy; `limits` [B] int64: most tokens of each.

        Prompts are Prompts, or what `encode` takes: texts, chats, rows.
        """
        prompts = self.encode(prompts)
        with self._timed("generate"), finite_sampling():
            seed = derive_seed(self.config.run.seed, "rollout", self.state.step, self._rollouts)
            self._rollouts += 1
            return self.algorithm.sample(prompts, seed, limits)

    def score(self, rollout: Rollout, scores: torch.Tensor | Sequence[float] | None = None) -> ScoredRollout:
        """Score a rollout by every role; `scores` of one's own, [B] or [B, T], replace the configured reward (shaping still applies).

        NumericError for numbers that aren't finite, PluginError when a reward or reference fails, DataError for a rollout that
        the base can't read, ConfigError without scores where the config has no reward.
        """
        if scores is None:
            self._require_reward()
        with self._timed("score"), self._dumped(Phase("score", rollout, own=scores)), self._asking():
            scored = self.algorithm.score(rollout, scores)
            scored = shape(scored, self.config.shaping, self.state.reward_stats)
            self.checks.check_scored(self.algorithm, scored)
            return scored

    def advantages(self, scored: ScoredRollout) -> Advantages:
        """What the update learns from, by the config's estimator: KL, token rewards, advantages, and returns where there are values."""
        return self.algorithm.advantages(self._on_device(scored), self.state.kl_coef)

    def update(self, scored: ScoredRollout, advantages: Advantages | None = None) -> UpdateStats:
        """Train policy and value on a scored rollout; this ends the step: `done` counts up, the KL coefficient adapts.

        The pre-flight check runs before the first update.
        """
        scored = self._on_device(scored)
        if self.preflight is None:
            self.check_start(scored.rollout.prompts, ask_rewards=bool(scored.parts))  # not one that isn't used
        if self.done >= self.config.ppo.steps and self.config.ppo.schedule != "constant":
            warn(
                f"step {self.done + 1} is beyond ppo.steps: {self.config.ppo.steps}, where the learning rate's schedule "
                f"({self.config.ppo.schedule}) ends at 0, and stays there. Raise ppo.steps, or use ppo.schedule: constant."
            )
        self._whole = False
        with self._timed("update"), self._dumped(Phase("update", scored.rollout, scored, own=advantages)):
            fitted = None if advantages is None else advantages.fitted(scored.rollout)
            stats = self.train_on(scored, fitted, generator(self.config.run.seed, "minibatches", self.state.step))
        trained = trained_tensors(self.bank, self.roles.trained)
        self.ranks.assert_equal(f"the trained weights after step {self.state.step + 1}", trained)
        self._advance(scored)
        self._whole = True
        self.ending.unsaved += 1
        return stats

    def train_on(
        self, scored: ScoredRollout, advantages: Advantages | None, order: torch.Generator, step: Step | None = None
    ) -> UpdateStats:
        """The update alone, as this step makes it (or another `step`, on some of the rows): the state stays as it is."""
        algorithm, state, run = step or self.algorithm, self.state, self.config.run
        with seeded(self.bank.device, run.seed, "dropout", state.step, *self.ranks.seed_parts):
            chosen = algorithm.advantages(scored, state.kl_coef) if advantages is None else advantages
            set_learning_rates(self.optimizer, state.step, self.config.ppo)
            stats = algorithm.update(scored, chosen, self.optimizer, state.kl_coef, order)
            self.checks.check_update(algorithm, stats)
        return stats

    def _advance(self, scored: ScoredRollout) -> None:
        state, kl = self.state, self.config.ppo.kl
        self._rollouts, self._kl_coef_used = 0, state.kl_coef
        stats, coef = state.reward_stats, state.kl_coef
        if self._scores_learned is not scored.scores:  # a rollout may be trained on more than once, and is learned once
            stats = learned(stats, scored.scores, scored.rollout.finished, self.config.shaping)
            self._scores_learned = scored.scores
        self.state = replace(state, step=state.step + 1, reward_stats=stats)
        self.plan.hooks.update_end(self.state.step, self.bank, self.roles.trained.policy)
        if kl.target is not None and scored.ref_logprobs is not None:
            gap = masked_sum(scored.logprobs - scored.ref_logprobs, scored.rollout.mask, dim=1)
            coef = adapt_kl_coef(coef, float(gap.mean()), kl.target, kl.horizon, len(gap))
            self.state = replace(self.state, kl_coef=coef)

    def finish(self, scored: ScoredRollout, advantages: Advantages, update: UpdateStats) -> StepStats:
        """The metrics of the step that `update` ended; observers hear of them."""
        scored = self._on_device(scored)
        fitted = advantages.fitted(scored.rollout)
        stats = step_stats(self.state.step, scored, fitted, update, self._kl_coef_used, self.seconds)
        seconds = ", ".join(f"{name} {spent:.2f} s" for name, spent in self.seconds.items())
        logger(RUN).debug("step %d of %d: %s", self.state.step, self.config.ppo.steps, seconds)
        self.seconds = {}
        self._last = stats
        self.plan.hooks.step_end(stats, scored)
        self.guard.step_ended(self.state.step)
        self.ending.show()
        return stats

    def _require_reward(self) -> None:
        """ConfigError when there is nothing to score a response with."""
        if not self.roles.rewards:
            raise ConfigError(
                "reward: this config names none, so nothing scores a response. Give a reward (a function of yours, or a strategy) in the "
                "config, or scores of your own: runner.step(rollout=rollout, scores=scores)."
            )

    def _on_device(self, scored: ScoredRollout) -> ScoredRollout:
        """On the bank's device, where a scored rollout of one's own needn't be."""
        device = self.bank.device
        return scored if scored.rollout.ids.device == device else scored.to(device)

    # -- the run --------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[StepStats]:
        """Run the remaining steps, handing out each one's numbers; checkpoints and evaluations are made on the way.

        After the last step the run ends as `train` ends it: last evaluation, final adapter, end of the observers. Closing the iterator
        before that ends the run for its observers; calling this again goes on from there.
        """
        if self._ended():
            return
        with self._told():
            yield from self._steps()
            self._finish()
        self._let_go()

    def request_stop(self, reason: str) -> None:
        """End the run after the step it is in, as if that were the last of `ppo.steps`; `reason` is told wherever the end is.

        For code that has the Runner: a loop over `steps()`, another thread, a button in a notebook. A strategy returns a `StopRun`.
        """
        self.ending.ask(reason)

    @property
    def stopped(self) -> str | None:
        """Why the run ended before its last step, where somebody asked it to."""
        return self.ending.stopped

    def _steps(self) -> Iterator[StepStats]:
        config = self.config
        self._require_reward()
        self.prepare()
        self.observers.begin(self.done, self.bank.tokenizer)
        self.ending.go_on()
        if self.folder is not None:
            warn_if_short(self.folder.path, self._checkpoint_bytes * (config.run.keep + 2))
        self.ending.show()
        if self.done == 0:
            self.evaluate()
        failed, ending = 0, self._ends()
        while not ending:
            if self.folder is not None:
                self.folder.hold()
            stats = self.step(self.prompts())
            ending = self._ends()
            if config.eval.every and self.done % config.eval.every == 0 and not ending:
                self.evaluate()
                ending = self._ends()
            if ending or (config.run.checkpoint_every and self.done % config.run.checkpoint_every == 0):
                failed = 0 if self._saved(failed) else failed + 1
            yield stats
            if not ending and self._ends():  # asked for by whoever was handed the step
                self._saved(failed)
                return

    def _ends(self) -> bool:
        """Whether no step follows: all are done, or somebody asked the run to stop. The same on all ranks."""
        return self.done >= self.config.ppo.steps or self.ending.was_asked()

    def train(self) -> RunResult:
        """Run to the end: steps, last evaluation, final adapter, end of the observers.

        Ctrl-C and SIGTERM end it after the step they came in, with a checkpoint: `Stopped` is raised then. Of a run that has ended
        already, as after a loop over `steps`, it gives the result.
        """
        if self._result is not None and self._ended():
            return self._result
        try:
            with self._told(), StopRequest() as stop:
                for _ in self._steps():
                    number = int(self.ranks.all_reduce_max([stop.signal or 0])[0])  # a signal to one rank stops all
                    if number:
                        raise self._stopped(signal.Signals(number))
                return self._finish()
        finally:
            self._let_go()

    def _ended(self) -> bool:
        """Whether the run has come to its end, and nothing was asked of it since."""
        return self._result is not None and self._result.steps == self.done >= self.config.ppo.steps

    def end(self) -> RunResult:
        """End a loop of one's own as `train` ends: checkpoint, last evaluation, final adapter, end of the observers; the folder is free.

        ConfigError when no step was made.
        """
        if self.preflight is None:
            raise ConfigError("end: no step was made yet, so there is nothing to end. Call step, or train.")
        if self._result is not None and self._result.steps == self.done:
            return self._result
        try:
            with self._told():
                self._save_once()
                return self._finish()
        finally:
            self._let_go()

    def __enter__(self) -> Self:
        """A block that makes a run by hand."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """The end of the run, unless it has ended; after an error the observers hear of that."""
        if error is None and self.observers.began:
            self.end()
        elif error is not None:
            try:
                with suppress(type(error)), self._told():
                    raise error
            finally:
                self._let_go()

    def _let_go(self) -> None:
        """Others may have the strategies and the folder."""
        self.plan.release()
        if self.folder is not None:
            self.folder.release()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A block of the run, however it ends: who hears of it, and what a failure says of the steps before it."""
        with self.ending.told(lambda: self.done):
            try:
                yield
            except Exception as error:
                if not isinstance(error, Stopped):
                    tell_beside(error, self._way_on())
                raise

    def _way_on(self) -> str:
        """After a failure: what is saved of the steps done, and how to go on; empty where there is nothing to go on with.

        Weights and optimizer are those of the last whole step unless an update was under way: then they are saved now. Of several
        processes the others may be gone, and saving would wait for them.
        """
        if self.folder is None or self.preflight is None or not self.done or self.folder.lock.lost:
            return ""
        if self._whole and self.ranks.size == 1 and self._intact_checkpoint() is None:
            with suppress(SaveFailed, OSError, SafetensorError, MarlError):
                self.save()
        return self.folder.way_on()

    def _finish(self) -> RunResult:
        if self.folder is not None:
            self.folder.hold()
        done_already = self._evaluated is not None and self._evaluated.step == self.done
        after = self._evaluated if done_already else self.evaluate()
        if self.folder is not None:
            try:
                self.folder.finish(self.bank, self.roles.trained.policy)
            except (OSError, SafetensorError) as error:
                raise DataError(
                    f"final: {self.folder.path / 'final'} could not be written ({error}); the last checkpoint holds the same weights. "
                    "Make room on that disk and resume: only this is left to do."
                ) from error
            self.ending.record(self.done, self.config.ppo.steps)
            draw(self.folder.path)
        self.ranks.all_gather_object(None)  # nobody leaves before the first rank has written
        before = self.folder.first_evaluation() if self.folder is not None else self.before
        folder = str(self.folder.path) if self.folder else None
        self._result = RunResult(folder, self.done, self._last, before, after, self.stopped)
        logger(RUN).info("finished after %d steps%s", self.done, f", in {folder}" if folder else "")
        self.observers.end(self._result)
        return self._result

    def _stopped(self, number: signal.Signals) -> Stopped:
        """Save, unless this very step has been saved, and say how to go on."""
        where = "nothing was saved: this run has no run.folder."
        if self.folder is not None:
            way = in_words(f"`marl run {self.folder.path} --resume`", RESUME[1])
            where = f"saved in {self._save_once()}. Go on with {way}."
        (where, *_) = self.ranks.all_gather_object(where)
        return Stopped(f"stopped by {number.name} after step {self.done}; {where}", number)

    def _intact_checkpoint(self) -> Path | None:
        """The checkpoint of just the steps done, where there is one."""
        if self.folder is None:
            return None
        target = self.folder.checkpoints / checkpoint.name_of(self.done)
        return target if target.is_dir() and checkpoint.damage(target) is None else None

    def prompts(self) -> Prompts:
        """The next step's prompts. ConfigError when the config names none."""
        config = self.config
        if self.data is None or config.data is None:
            raise ConfigError(
                "data: this config names no prompts, so there is nothing to run on. Add data.prompts, or call step(prompts)."
            )
        count = config.ppo.batch // config.ppo.samples_per_prompt
        return self.data.batch(self.done, count, config.run.seed, config.data.shuffle)

    def evaluate(self) -> Evaluation | None:
        """Evaluate on the held-out prompts and append it to the run folder; None without such prompts."""
        if self.heldout is None:
            return None
        with self.running(), self._memory("evaluation"), self._asking(), phase("evaluation"):
            evaluation = evaluate(self.algorithm, self.config.eval, self.heldout, self.done)
        logger(RUN).info(
            "evaluation at step %d: reward %.3f, KL %.2f nats per response", self.done, evaluation.reward, evaluation.kl
        )
        self.before = self.before or evaluation
        if self.folder is not None:
            self.folder.add_evaluation(asdict(evaluation))
        self._evaluated = evaluation
        self.observers.evaluation(evaluation, self.bank, self.roles.trained.policy)
        return evaluation

    def save(self) -> Path | None:
        """Write a checkpoint; None when the run has no folder. SaveFailed when it can't be written: older ones stay intact."""
        if self.folder is None:
            return None
        self.prepare()
        self.guard.step_ended(self.done, thorough=True)
        folder, trained = self.folder.checkpoints, self.roles.trained
        self.folder.hold()
        try:
            self.folder.flush()
            strategy_tensors = strategy_state.collect(self.plan, self.bank, trained.policy)
            keep = self.config.run.keep
            saved = checkpoint.save(folder, self.bank, trained, self.optimizer, self.state, keep, strategy_tensors)
            self.ending.unsaved = 0
            logger(RUN).info("checkpoint saved in %s", saved)
            return saved
        except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
            raise save_failed(folder, self.done, self._checkpoint_bytes, error) from error

    def _save_once(self) -> Path | None:
        """The checkpoint of this very step, written unless it is there and whole."""
        return self._intact_checkpoint() or self.save()

    def _saved(self, failed: int) -> bool:
        """Save. A full disk is a warning, and an error only after it has happened several times in a row."""
        try:
            self._save_once()
        except SaveFailed as error:
            if failed + 1 >= FAILED_SAVES_ALLOWED:
                raise
            warn(f"{error} Training goes on.")
            return False
        return True

    def _read_checkpoint(self) -> None:
        """Put the newest whole checkpoint's state in place; the first rank chooses it, every rank reads it."""
        if self.config.run.folder is None:
            raise ConfigError("resume: this config has no run.folder, so there is nothing to resume from.")
        (chosen, *_) = self.ranks.all_gather_object(self._newest_checkpoint())
        if chosen is None:
            return
        path = Path(chosen)
        if not path.is_dir():
            raise DataError(
                f"resume: rank {self.ranks.rank} finds no {chosen}. Put run.folder on a disk that all processes see."
            )
        trained = self.roles.trained
        self.state = checkpoint.load(path, self.bank, trained, self.optimizer)
        strategy_state.restore(path, self.plan, self.bank, trained.policy)
        logger(RUN).info("resumed at step %d from %s", self.state.step, path)
        if self.folder is not None:
            self.folder.go_on_from(self.state.step)

    def _newest_checkpoint(self) -> str | None:
        """The first rank's choice of a checkpoint."""
        if self.folder is None:
            return None
        if self.folder.records_inputs:
            self.folder.refuse_other_inputs(self._provenance, self.bank.fingerprint, override=self.override)
        newest = self.folder.newest_checkpoint()
        return str(newest.resolve()) if newest is not None else None

    def prepare(self) -> Preflight:
        """The pre-flight check on the next step's prompts, once."""
        return self.preflight or self.check_start(self.prompts())

    def check_start(self, prompts: Prompts | GivenPrompts, *, ask_rewards: bool = True) -> Preflight:
        """The pre-flight check; once it has passed the run folder is made, and the observers hear of the start.

        `ask_rewards`: false where scores are brought by hand, so that the configured rewards and judges needn't know these prompts.
        """
        with self._folder_kept():
            return self._check_start(self.encode(prompts), ask_rewards)

    def _check_start(self, prompts: Prompts, ask_rewards: bool) -> Preflight:
        tokens = None if self.data is None else self.data.tokens
        require_same_start(self.ranks, self.config, self.bank, self.roles.trained, tokens)
        with (
            self.running(),
            self._memory("pre-flight"),
            self._asking(),
            phase("pre-flight"),
        ):  # what is logged here is of no step
            fresh = self.done == 0
            result = preflight(
                self.plan,
                self.algorithm,
                prompts,
                self.built.gradient,
                self.optimizer,
                fresh=fresh,
                ask_rewards=ask_rewards,
            )
        for check in result.checks:
            logger(PREFLIGHT).info("%s", check.detail, extra={"ok": check.ok})
        self.preflight = result
        self.guard.baseline()
        if self.folder is not None:
            self.folder.start(self.config, self.done, self._provenance, result.as_dict())
        self.observers.begin(self.done, self.bank.tokenizer)
        return result

    @cached_property
    def _provenance(self) -> dict[str, Any]:
        rows, eval_rows = (None if data is None else data.rows for data in (self.data, self.heldout))
        return provenance(self.plan, self.bank, self.ranks.size, rows, eval_rows)

    @property
    def _checkpoint_bytes(self) -> int:
        return checkpoint_bytes(self.bank, self.roles.trained)

    def _prompts(self, early: PromptSets | None) -> PromptSets:
        """Prompts that fit into the positions that the model leaves beside a response; those read before it was loaded, if they do."""
        bank = self.built.bank
        vocabulary = vocabulary_of(bank.base)
        if early is not None and early.fit(self.config, self._room, vocabulary):
            return early
        return PromptSets.read(self.config, bank.tokenizer, self._room, vocabulary)

    @property
    def _room(self) -> int:
        """Positions that the model leaves for a prompt beside a response.

        A row that grows past the length where its rotary frequencies change would be sampled with other frequencies than it is scored with.
        """
        bank = self.built.bank
        positions = min(filter(None, (position_limit(bank.base), bank.trunk.stretched.until)), default=None)
        return UNBOUNDED_ROOM if positions is None else max(1, positions - self.config.sampling.max_new_tokens)

    # -- around every call ----------------------------------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[None]:
        """A block with this run's number of threads and torch's default modes, whatever block of torch's the caller is in.

        Its phases are told to this run's observers.

        Every method that computes opens it by itself.
        """
        listener = self.observers.progress if self.ranks.first else None
        with default_torch_modes(), threads(self.config.run.threads), listening(listener):
            yield

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        if is_on(self.config.speed.trim_memory, self.bank.device.type):
            trim_heap()
        with timed(self.seconds, phase, self.bank.device), self.running(), self._memory(phase):
            yield

    def _memory(self, phase: str) -> AbstractContextManager[None]:
        return memory_told(phase, self.config, self.bank.device.type)

    def _dumped(self, phase: Phase) -> AbstractContextManager[None]:
        folder = self.folder.path if self.folder is not None and self.folder.owned else None
        return dump_on_error(folder, self.algorithm, self.state, phase, self.guard)

    def _asking(self) -> AbstractContextManager[RewardContext]:
        """Around every call of reward functions: they may ask where the run is, and log."""
        ppo, done = self.config.ppo, self.done
        prompts = ppo.batch / ppo.samples_per_prompt / (len(self.data) if self.data else 1)
        return asking(RewardContext(done, ppo.steps, done * prompts, ppo.steps * prompts, self.ranks.first))


def _checked(config: RunConfig | Plan, catalog: Catalog | None) -> Plan:
    """The config's plan, which can work; what may not be meant is warned of."""
    if isinstance(config, Plan):
        return config
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"Runner: a {type(config).__name__} was given, not a config. Give a RunConfig: RunConfig(**sections), or load_config(FILE), "
            "which reads a YAML file."
        )
    plan = Plan.of(config, catalog)
    plan.require()
    for warning in plan.warnings():
        warn(warning)
    return plan
