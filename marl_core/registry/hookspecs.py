"""The hooks: everything a strategy can do.

A hook may gain arguments; it never loses or reorders them. All arguments are optional for the implementer: take those
you need, by name. Each example below is executed by `tests/unit/registry/test_hookspecs.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import pluggy

from marl_core.registry.strategy import Adapter, Estimator, Quantization, StopRun

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from marl_core.bank.adapters import AdapterBank
    from marl_core.bank.views import ScoreView, View
    from marl_core.plan.plan import Plan
    from marl_core.ppo.roles import ReferenceFunction, RewardFunction
    from marl_core.ppo.types import Evaluation, RunResult, ScoredRollout, StepStats

hookspec = pluggy.HookspecMarker("marl")


class MarlSpecs:
    """Names, arguments and results of all hooks."""

    @hookspec
    def marl_check(self, plan: Plan) -> Iterable[str] | None:
        """Say why this run can't work, before any weight is read.

        Family: any.
        Called: once per strategy, by `marl check` and at the start of every run. Be quick, import nothing heavy.

        Arguments:
            plan: the whole config with its strategies; no model exists yet.

        Result: a sentence for each reason, naming the config key; None or nothing means it sees no obstacle.

        Example:
            class Patient(Strategy):
                @hookimpl
                def marl_check(self, plan: Plan) -> Iterable[str]:
                    if plan.config.ppo.steps < 10:
                        yield f"ppo.steps: {plan.config.ppo.steps} is too short for a patient run; use 10 or more."
        """

    @hookspec(firstresult=True)
    def marl_describe(self, plan: Plan) -> str | None:
        """Say in a few words what these weights or numbers are, for `marl check`.

        Family: reference, reward, adapter. A reference that has this hook speaks for itself: the core then doesn't guess from its
        options whether it is where the policy starts (the pre-flight check still measures it).
        Called: when a plan is described or its warnings are gathered, before any weight is read. Import nothing heavy.

        Arguments:
            plan: the whole config with its strategies; no model exists yet.

        Result: a clause without a full stop; None: the core describes it from its options.

        Example:
            class Echo(Strategy):
                @hookimpl
                def marl_describe(self, plan: Plan) -> str:
                    return f"{plan.config.model.path}, asked again"
        """

    @hookspec(firstresult=True)
    def marl_adapter(
        self, layers: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], role: str
    ) -> Adapter | None:
        """Say what is trained: a kind of adapter, and what can't be seen of it in time.

        Family: adapter, which must have it.
        Called: for the policy, and for the value where it has an adapter of its own: by `marl check` with shapes from the files' headers,
        and again with the loaded model's right before the adapter is made. Import nothing heavy; `Adapter.config` may.

        Arguments:
            layers: the linear layers that the config's `targets` match, by full name: (out, in) of each.
            shapes: every weight of the model by name, experts as one tensor for all, as transformers holds them.
            role: "policy" or "value".

        Result: an `Adapter`. None is refused.

        Example:
            class Scaled(Strategy):
                @hookimpl
                def marl_adapter(self, layers: Mapping[str, tuple[int, ...]]) -> Adapter:
                    return Adapter(self._config, learned=sum(out for out, _ in layers.values()))
                def _config(self) -> Any:
                    from peft import IA3Config
                    return IA3Config(feedforward_modules=[])
        """

    @hookspec(firstresult=True)
    def marl_quantization(self, compute_dtype: str) -> Quantization | None:
        """Say how transformers loads the base, and what the loaded base can do.

        Family: quantization, which must have it.
        Called: once, when the plan's `quantization` is first read, before the base is loaded. Import backends inside.

        Arguments:
            compute_dtype: `model.dtype` of the config: "float32", "bfloat16" or "float16".

        Result: a `Quantization`. None is refused: to load unquantized, return `Quantization()`.

        Example:
            class Plain(Strategy):
                @hookimpl
                def marl_quantization(self, compute_dtype: str) -> Quantization:
                    return Quantization(bytes_per_weight=4.0 if compute_dtype == "float32" else 2.0)
        """

    @hookspec(firstresult=True)
    def marl_prepare_base(self, base: PreTrainedModel) -> PreTrainedModel | None:
        """Change the base before anything else is built on it, e.g. merge an adapter into it.

        Family: reference.
        Called: once, only on strategies that implement it, with the full-precision float32 base, before it is
        quantized, cast or given adapters. The core quantizes and casts the result.

        Arguments:
            base: the causal language model as loaded.

        Result: the base to use, the same object or another. None leaves the base as it is.

        Example:
            class Frozen(Strategy):
                @hookimpl
                def marl_prepare_base(self, base: PreTrainedModel) -> PreTrainedModel:
                    return base.requires_grad_(False)
        """

    @hookspec(firstresult=True)
    def marl_reference(self, bank: AdapterBank, temperature: float, policy: str) -> View | ReferenceFunction | None:
        """Say which weights are the reference policy.

        Family: reference, which must have it.
        Called: once, after the bank holds base and policy, before the first rollout. Load frozen adapters here.

        Arguments:
            bank: the shared base and its adapters.
            temperature: sampling temperature; a function's log-probs must use it too (a View's do).
            policy: name of the policy's adapter in the bank.

        Result: a `View` of the shared base, which the core may evaluate together with others, or, for weights that live
        elsewhere, a function from a `Rollout` to log-probs [B, T]. None is refused.

        Example:
            class BareBase(Strategy):
                @hookimpl
                def marl_reference(self) -> View:
                    return View(None)
        """

    @hookspec(firstresult=True)
    def marl_reward(self, bank: AdapterBank, tokenizer: PreTrainedTokenizerBase) -> ScoreView | RewardFunction | None:
        """Say what scores a response.

        Family: reward, which must have it.
        Called: once for each source in `reward` and each judge in `eval.judges`, before the first rollout.

        Arguments:
            bank: the shared base and its adapters.
            tokenizer: the base's tokenizer; a copy may be changed, this one not.

        Result: a `ScoreView` (shared base through an adapter, with a score head), or a function from a `Rollout` to one
        finite float per response, [B], or to a score for each token, [B, T]. None is refused.

        Example:
            class Brevity(Strategy):
                target: int = 64
                @hookimpl
                def marl_reward(self) -> RewardFunction:
                    return lambda rollout: (self.target / rollout.mask.sum(dim=1)).clamp(max=1.0)
        """

    @hookspec(firstresult=True)
    def marl_advantage(self) -> Estimator | None:
        """Say how rewards become advantages, and what that needs.

        Family: advantage, which must have it.
        Called: when the plan's `estimator` is first read, before any weight is, and again for each run. Import nothing heavy
        here; torch is there by the time `estimate` is called.

        Arguments: none.

        Result: an `Estimator`; its `estimate` gets `AdvantageInputs`. None is refused.

        Example:
            class Plain(Strategy):
                @hookimpl
                def marl_advantage(self) -> Estimator:
                    return Estimator(lambda inputs: inputs.scores - inputs.scores.mean())
        """

    @hookspec
    def marl_update_end(self, step: int, bank: AdapterBank, policy: str) -> StopRun | None:
        """Act on the weights after an update, e.g. move a reference after the policy.

        Family: any.
        Called: after every PPO update, before its metrics, evaluation and checkpoint; also in loops of one's own. What is
        changed here must depend on weights, step and options alone, or be given by `marl_state`: resume is exact.

        Arguments:
            step: steps done, this one included.
            bank: the shared base and its adapters.
            policy: name of the policy's adapter in the bank.

        Result: None to go on; `StopRun("the reason")` ends the run after this step. In a loop of one's own nobody reads it.

        Example:
            class Watch(Strategy):
                @hookimpl
                def marl_update_end(self, step: int, policy: str) -> None:
                    print(f"{policy} was updated for the {step}th time")
        """

    @hookspec(firstresult=True)
    def marl_state(self, bank: AdapterBank, policy: str) -> Mapping[str, Tensor] | None:
        """Give what a checkpoint must keep of this strategy.

        Family: any.
        Called: at every checkpoint.

        Arguments:
            bank: the shared base and its adapters.
            policy: name of the policy's adapter in the bank.

        Result: tensors by name, stored as they are; None when nothing needs to be kept.

        Example:
            class Remembering(Strategy):
                @hookimpl
                def marl_state(self, bank: AdapterBank) -> Mapping[str, Tensor]:
                    return dict(bank.tensors("mine"))
        """

    @hookspec
    def marl_restore(self, state: Mapping[str, Tensor], bank: AdapterBank, policy: str) -> None:
        """Take over what `marl_state` gave when the checkpoint was written.

        Family: any.
        Called: on resume, after the reference and the rewards were built, if the checkpoint holds something of this strategy.

        Arguments:
            state: the tensors, on the CPU.
            bank: the shared base and its adapters.
            policy: name of the policy's adapter in the bank.

        Result: ignored; None by convention.

        Example:
            class Restored(Strategy):
                @hookimpl
                def marl_restore(self, state: Mapping[str, Tensor]) -> None:
                    print("found", *state)
        """

    @hookspec
    def marl_run_start(self, plan: Plan, done: int, tokenizer: PreTrainedTokenizerBase) -> StopRun | None:
        """Watch a run begin.

        Family: observer (any other may listen too).
        Called: once, after the plan was checked and the run folder exists, before the first step. Also after a resume.

        Arguments:
            plan: the config, its strategies and the quantization.
            done: steps already done: 0, or more after a resume.
            tokenizer: the base's tokenizer, to decode tokens; don't change it.

        Result: None to go on; `StopRun("the reason")` ends the run before its next step.

        Example:
            class Greeter(Strategy):
                @hookimpl
                def marl_run_start(self, plan: Plan) -> None:
                    print(f"{plan.config.ppo.steps} steps on {plan.config.model.path}")
        """

    @hookspec
    def marl_step_end(self, stats: StepStats, scored: ScoredRollout) -> StopRun | None:
        """Watch a step end, and end the run if it should go no further.

        Family: observer (any other may listen too).
        Called: after every PPO step, in the order of the config. Time spent here is time of the run.

        Arguments:
            stats: the step's numbers, floats only.
            scored: the step's responses, log-probs and scores. Don't keep it: it holds the batch's tensors.

        Result: None to go on; `StopRun("the reason")` ends the run after this step, as if it were the last. In a loop of one's own
        nobody reads it.

        Example:
            class Limit(Strategy):
                nats: float = 10.0
                @hookimpl
                def marl_step_end(self, stats: StepStats) -> StopRun | None:
                    print(f"step {stats.step}: KL {stats.kl_nats:.1f} nats")
                    return StopRun(f"KL is above {self.nats:g} nats") if stats.kl_nats > self.nats else None
        """

    @hookspec
    def marl_progress(self, phase: str, done: int, total: int) -> None:
        """Watch a step while it is being made: which phase it is in, and how far that is.

        Family: observer (any other may listen too).
        Called: between marl_run_start and the run's end, in the first process of a run: at the beginning of each phase, at its end, and at
        most five times a second between them. Be quick, and compute nothing with the bank: passes are under way.

        Arguments:
            phase: `sampling` (tokens of a response), `scoring: policy`, `scoring: reference`, `scoring: value`,
                `scoring: reward NAME` (responses), `update` (minibatches of all epochs), `evaluation` (responses) with the same phases in
                it (`evaluation: sampling`).
            done: how much of the phase is done.
            total: how much there is. A phase that ends early doesn't come to it.

        Result: ignored; None by convention.

        Example:
            class Dots(Strategy):
                @hookimpl
                def marl_progress(self, phase: str, done: int, total: int) -> None:
                    print(f"{phase} {done}/{total}", end="\\r")
        """

    @hookspec
    def marl_evaluation_end(self, evaluation: Evaluation, bank: AdapterBank, policy: str) -> StopRun | None:
        """Watch an evaluation on the held-out prompts end: keep the best adapter, or end the run if it should go no further.

        Family: observer (any other may listen too).
        Called: after each evaluation: before the first step, every `eval.every` steps, and after the last one.

        Arguments:
            evaluation: its step, means and `eval.samples` responses with their texts; a judge's `mean` is None where the judge
                abstained from all.
            bank: the shared base and its adapters, to save the policy as it is now, `bank.save(policy, folder)`; don't change it.
            policy: name of the policy's adapter in the bank.

        Result: None to go on; `StopRun("the reason")` ends the run here. After the last step nobody reads it.

        Example:
            class HeldOut(Strategy):
                @hookimpl
                def marl_evaluation_end(self, evaluation: Evaluation) -> StopRun | None:
                    print(f"reward on held-out prompts at step {evaluation.step}: {evaluation.reward:.2f}")
                    return StopRun("the reward is high enough") if evaluation.reward > 0.9 else None
        """

    @hookspec
    def marl_evaluation(self, evaluation: Evaluation) -> StopRun | None:
        """The old name of `marl_evaluation_end`: deprecated since 0.1, gone in 0.2.

        Family: observer (any other may listen too).
        Called: where `marl_evaluation_end` is.

        Arguments:
            evaluation: as `marl_evaluation_end` gets it.

        Result: as that of `marl_evaluation_end`.

        Example:
            class HeldOut(Strategy):
                @hookimpl
                def marl_evaluation(self, evaluation: Evaluation) -> None:
                    print("held out at step", evaluation.step)
        """

    @hookspec
    def marl_run_end(self, result: RunResult) -> None:
        """Watch a run end.

        Family: observer (any other may listen too).
        Called: once, after the final adapter was saved; not when the run failed: see marl_run_failed.

        Arguments:
            result: what the run gave: its folder, the last numbers, evaluation before and after; `stopped` is the reason where it
                was asked to stop before its last step.

        Result: ignored; None by convention.

        Example:
            class Farewell(Strategy):
                @hookimpl
                def marl_run_end(self, result: RunResult) -> None:
                    print("done:", result)
        """

    @hookspec
    def marl_run_failed(self, step: int, error: BaseException) -> None:
        """Watch a run end before its last step; close what marl_run_start opened.

        Family: observer (any other may listen too).
        Called: once, instead of marl_run_end, when an error ends a run that has begun, Ctrl-C or SIGTERM stops it, or the
        iterator of `Runner.steps()` is given up. Where the iterator is asked for again, marl_run_start comes again.

        Arguments:
            step: steps done.
            error: what ended it: marl's `Stopped` for a signal, `GeneratorExit` for an iterator that was given up.

        Result: ignored; None by convention. What it raises becomes a warning: the first cause is what the run ends with.

        Example:
            class Alarm(Strategy):
                @hookimpl
                def marl_run_failed(self, step: int, error: BaseException) -> None:
                    print(f"ended after step {step}: {error!r}")
        """
