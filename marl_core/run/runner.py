"""Runner: a run from start to end. `step` reads like the algorithm on paper; its parts can be called by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from marl_core.bank.adapters import AdapterBank
from marl_core.bank.out_of_memory import memory_told
from marl_core.bank.room import position_limit, vocabulary_of
from marl_core.config.device import device_of
from marl_core.config.run_config import DataSection, RunConfig
from marl_core.data.prompts import PromptData
from marl_core.errors import warn
from marl_core.parallel.process_group import join
from marl_core.parallel.rank_consistency import agree_at_start, trained_tensors
from marl_core.plan.plan import Plan
from marl_core.ppo import role_scoring
from marl_core.ppo.data_parallel import generate_in_shares, score_in_shares
from marl_core.ppo.estimators import estimate_advantages
from marl_core.ppo.metrics import step_stats
from marl_core.ppo.objectives import adapt_kl_coef, masked_sum
from marl_core.ppo.reward_context import RewardContext, asking, logged
from marl_core.ppo.sampling.sampler import generate, stop_ids
from marl_core.ppo.scoring import require_fit
from marl_core.ppo.seeds import derive_seed, generator, seeded
from marl_core.ppo.shaping import Shaper
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
from marl_core.ppo.update import Batch, update_epochs
from marl_core.registry.catalog import Catalog
from marl_core.run import loop
from marl_core.run.allocator import give_back
from marl_core.run.observers import Audience
from marl_core.run.optimizer import learning_rate_factor, make_optimizer
from marl_core.run.roles import build_roles
from marl_core.run.timing import as_alone, threads, timed
from marl_core.safety.dump import to_device
from marl_core.safety.preflight import Preflight, preflight
from marl_core.safety.step_checks import Guards, sampling
from marl_core.store.folder import RunFolder


class Runner:
    """PPO on one shared base.

    `Runner(config).train()` does everything; `for stats in runner.steps()` hands out each step; `generate`, `score`
    and `update` are the step's parts, for loops of one's own. Two Runners may share one `bank`, each with a `policy` name.
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

        A Plan instead of a config has been checked by whoever made it.
        """
        if isinstance(config, RunConfig):
            self.plan = Plan.of(config, catalog)
            self.plan.require()
            for warning in self.plan.warnings():
                warn(warning)
        else:
            self.plan = config
        self.plan = self.plan.for_run(self)
        self.ranks = join(self.plan.config)
        self.plan = self.plan if self.ranks.first else self.plan.without_observers()
        self.config = config = self.plan.config
        self.override = override
        self.folder = RunFolder.open(config, resume=resume, override=override) if self.ranks.first else None
        self.guards, self.audience = Guards(), Audience()
        self.plan.hooks.around = self.guards.watch.around
        with as_alone(), threads(config.run.threads), memory_told("loading", config, device_of(config)):
            self.roles = self.guards.watch.wrapped_roles(build_roles(self.plan, policy, bank))
        self.bank = self.roles.bank
        try:
            with self.running():
                self._open(resume)
        except BaseException:
            self.roles.discard()
            raise

    def _open(self, resume: bool) -> None:
        """Data, optimizer and counters; then, on resume, the checkpoint."""
        config = self.config
        model_eos = self.bank.base.generation_config.eos_token_id
        self.stops = stop_ids(self.bank.tokenizer, config.sampling, model_eos, vocabulary_of(self.bank.base))
        self.data = self._prompts(config.data) if config.data else None
        self.heldout = self._heldout()
        self.optimizer = make_optimizer(self.roles.trained.parameters(self.bank), config)
        self.shaper = Shaper(config.shaping)
        self.kl_coef = config.ppo.kl.coef
        self.done = 0
        self.preflight: Preflight | None = None
        self.before: Evaluation | None = None
        self.seconds: dict[str, float] = {}
        self._rollouts = 0
        self._coef_used = self.kl_coef
        if resume:
            loop.resume(self)
        self.guards.watch.start(self.bank)

    # -- the algorithm --------------------------------------------------------------------------------------

    def step(self, prompts: Prompts) -> StepStats:
        """One PPO step on these prompts."""
        rollout = self.generate(prompts)
        scored = self.score(rollout)  # policy, reference, value, reward: views of one base
        advantages = estimate_advantages(scored, self.config.ppo, self.kl_coef, self.plan.estimator)
        update = self.update(scored, advantages)
        return self.finish(scored, advantages, update)

    def generate(self, prompts: Prompts, limits: torch.Tensor | None = None) -> Rollout:
        """Sample `samples_per_prompt` responses to each prompt from the policy; `limits` [B]: most tokens of each."""
        with self._timed("generate"), sampling():
            many = prompts.repeat(self.config.ppo.samples_per_prompt)
            seed = derive_seed(self.config.run.seed, "rollout", self.done, self._rollouts)
            self._rollouts += 1
            trained = self.roles.trained
            return generate_in_shares(
                self.ranks,
                many,
                lambda mine, first: generate(
                    self.bank,
                    trained.policy,
                    mine,
                    self.config.sampling,
                    self.stops,
                    seed,
                    limits=None if limits is None else limits[first : first + len(mine)],
                    samples=self.config.ppo.samples_per_prompt,
                    speed=self.config.speed,
                    value_head=trained.value_head if trained.value_on_policy else None,
                    first=first,
                    whole=len(many),
                ),
            )

    def score(self, rollout: Rollout, scores: torch.Tensor | Sequence[float] | None = None) -> ScoredRollout:
        """Every role's numbers; `scores` of one's own, [B] or [B, T], replace the configured reward (shaping still applies)."""
        with self._timed("score"), self.guards.phase(self, "score", rollout, own=scores):
            here = rollout.to(self.bank.device)
            require_fit(self.bank, here)
            scored = self._score(here, scores)
            self.guards.scored(self, scored)
            return scored

    def update(self, scored: ScoredRollout, advantages: Advantages | None = None) -> UpdateStats:
        """Train policy and value on a scored rollout; this ends the step: `done` counts up, the KL coefficient adapts.

        The pre-flight check runs before the first update.
        """
        scored = self._here(scored)
        if self.preflight is None:
            self.check_start(scored.rollout.prompts)
        seed = self.config.run.seed
        with (
            self._timed("update"),
            self.guards.phase(self, "update", scored.rollout, scored, advantages),
            seeded(self.bank.device, seed, "dropout", self.done, *self.ranks.salt),
        ):
            chosen = (
                estimate_advantages(scored, self.config.ppo, self.kl_coef, self.plan.estimator)
                if advantages is None
                else advantages.fitted(scored.rollout)
            )
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * learning_rate_factor(self.done, self.config.ppo)
            stats = update_epochs(
                self.bank,
                self.roles.trained,
                Batch(scored, chosen),
                self.optimizer,
                self.config.ppo,
                temperature=self.config.sampling.temperature,
                kl_coef=self.kl_coef,
                generator=generator(seed, "minibatches", self.done),
                ranks=self.ranks,
                tokens=role_scoring.token_budget(self.config, self.bank),
            )
            self.guards.updated(self, stats)
        self.ranks.agree(f"the trained weights after step {self.done + 1}", trained_tensors(self))
        self._advance(scored)
        return stats

    def _advance(self, scored: ScoredRollout) -> None:
        self.done, self._rollouts, self._coef_used = self.done + 1, 0, self.kl_coef
        if scored.raw_scores is not None:
            self.shaper(scored.raw_scores, scored.rollout.finished)  # learns them
        self.plan.hooks.update_end(self.done, self.bank, self.roles.trained.policy)
        kl = self.config.ppo.kl
        if kl.target is not None and scored.ref_logprobs is not None:
            gap = masked_sum(scored.logprobs - scored.ref_logprobs, scored.rollout.mask, dim=1)
            self.kl_coef = adapt_kl_coef(self.kl_coef, float(gap.mean()), kl.target, kl.horizon, len(gap))

    def finish(self, scored: ScoredRollout, advantages: Advantages, update: UpdateStats) -> StepStats:
        """The metrics of the step that `update` ended; observers hear of them."""
        scored = self._here(scored)
        fitted = advantages.fitted(scored.rollout)
        stats = step_stats(self.done, scored, fitted, update, self._coef_used, self.seconds)
        self.seconds = {}
        self.plan.hooks.step_end(stats, scored)
        self.guards.watch.step_ended(self.done)
        return stats

    def _here(self, scored: ScoredRollout) -> ScoredRollout:
        """On the bank's device, where a scored rollout of one's own needn't be."""
        device = self.bank.device
        return scored if scored.rollout.ids.device == device else to_device(scored, device)

    def _score(self, rollout: Rollout, scores: torch.Tensor | Sequence[float] | None) -> ScoredRollout:
        found = score_in_shares(
            self.ranks, rollout, self.config.ppo.minibatch, lambda mine: role_scoring.model_numbers(self, mine)
        )
        with self.asking() as context:
            given = role_scoring.rewards(self, rollout, scores)
        parts = self.ranks.everyone(context.part()) if scores is None else []
        said = logged(parts, [len(rollout) // self.ranks.size] * len(parts))
        shaper = self.shaper.ahead(given.total, rollout.finished)
        shaped, tokens = shaper(given.total, rollout.finished, learn=False), shaper.tokens(given.tokens)
        return ScoredRollout(
            rollout,
            found["logprobs"],
            found.get("reference"),
            found.get("values"),
            shaped,
            given.parts,
            given.total,
            found["entropy"],
            tokens,
            said,
        )

    def asking(self) -> AbstractContextManager[RewardContext]:
        """Around every call of reward functions: they may ask where the run is, and log."""
        prompts = self.config.ppo.batch / self.config.ppo.samples_per_prompt / (len(self.data) if self.data else 1)
        steps = self.config.ppo.steps
        return asking(RewardContext(self.done, steps, self.done * prompts, steps * prompts, self.ranks.first))

    # -- the run: see run/loop.py ---------------------------------------------------------------------------

    def steps(self) -> Iterator[StepStats]:
        """Run the remaining steps, handing out each one's numbers; checkpoints and evaluations are made on the way."""
        return loop.steps(self)

    def train(self) -> RunResult:
        """Run to the end: steps, last evaluation, final adapter, observers' farewell."""
        return loop.train(self)

    def save(self) -> Path | None:
        """Write a checkpoint; None when the run has no folder."""
        return loop.save(self)

    def prepare(self) -> Preflight:
        """The pre-flight check on the next step's prompts, once."""
        return self.preflight or self.check_start(loop.prompts(self))

    def check_start(self, prompts: Prompts) -> Preflight:
        """The pre-flight check; once it has passed the run folder is made, and the observers hear of the start."""
        agree_at_start(self)
        with self.running(), self._memory("pre-flight"), self.asking():  # what is logged here is of no step
            found = preflight(self.plan, self.roles, prompts, self.stops, fresh=self.done == 0)
        self.preflight = found
        self.guards.watch.settled()
        if self.folder is not None:
            self.folder.start(self, found)
        self.audience.begin(self)
        return found

    def _heldout(self) -> PromptData | None:
        if self.config.eval.prompts is None:
            return None
        asked = self.config.eval
        part = self.config.data or DataSection(prompts=self.config.eval.prompts)
        part = part.model_copy(update={"prompts": asked.prompts, "split": asked.split or part.split})
        return self._prompts(part)

    def _prompts(self, part: DataSection) -> PromptData:
        """Prompts that fit into the positions that the model leaves beside a response.

        A row that grows past the length where its rotary frequencies change would be sampled with others than it is scored.
        """
        positions = min(filter(None, (position_limit(self.bank.base), self.bank.trunk.stretched.until)), default=2**20)
        room = max(1, positions - self.config.sampling.max_new_tokens)
        return PromptData.load(part, self.bank.tokenizer, room, vocabulary_of(self.bank.base))

    @contextmanager
    def running(self) -> Iterator[None]:
        """A block in which threads and the shared base's passes are as this run's config says; afterwards as before.

        Every method that computes opens it by itself.
        """
        with as_alone(), threads(self.config.run.threads), self.bank.trunk.passing(self.roles.options):
            yield

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        if self.bank.device.type == "cpu":
            give_back()
        with timed(self.seconds, phase, self.bank.device), self.running(), self._memory(phase):
            yield

    def _memory(self, phase: str) -> AbstractContextManager[None]:
        return memory_told(phase, self.config, self.bank.device.type)
