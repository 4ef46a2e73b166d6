"""The mutants: what is wrong, which function gets it, how, and which tests must see it.

Text mutants say precisely what they change and fail when that text is gone. Where code is likely to be rewritten, the
fault is put around a function instead: into what it is given, or what it gives.
"""

from __future__ import annotations
import __future__

import contextlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

Change = Callable[[Any], Any]

# -- changing a function ------------------------------------------------------------------------------------------


def text(old: str, new: str) -> Change:
    """The function with `old` replaced by `new` in its source."""

    def change(original: Any) -> Any:
        plain: Any = original.fget if isinstance(original, property) else getattr(original, "__func__", original)
        source = textwrap.dedent(inspect.getsource(plain))
        if source.count(old) != 1:
            raise LookupError(
                f"{old!r} stands {source.count(old)} times in {plain.__qualname__}; write the mutant anew"
            )
        flags = __future__.annotations.compiler_flag
        code = compile(source.replace(old, new), f"<mutant of {plain.__qualname__}>", "exec", flags, dont_inherit=True)
        made: dict[str, Any] = {}
        exec(code, sys.modules[inspect.unwrap(plain).__module__].__dict__, made)
        return made[plain.__name__]

    return change


def call(wrapper: Callable[..., Any]) -> Change:
    """A function that calls `wrapper(original, *args, **kwargs)`."""
    return lambda original: lambda *args, **kwargs: wrapper(original, *args, **kwargs)


def given(**changed: Any) -> Change:
    """The function with some arguments replaced; a callable gets the old value."""

    def change(original: Any) -> Any:
        signature = inspect.signature(original)
        if not set(changed) <= set(signature.parameters):
            raise LookupError(
                f"{original.__qualname__} has no argument {sorted(set(changed) - set(signature.parameters))}"
            )

        def mutated(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            for name, value in changed.items():
                bound.arguments[name] = value(bound.arguments[name]) if callable(value) else value
            return original(*bound.args, **bound.kwargs)

        return mutated

    return change


def gives(result: Callable[[Any], Any]) -> Change:
    """The function with something done to what it gives."""
    return call(lambda original, *args, **kwargs: result(original(*args, **kwargs)))


def nothing(original: Any) -> Any:
    """The function does nothing."""
    del original
    return lambda *args, **kwargs: None


# -- faults that are more than an exchange ------------------------------------------------------------------------


def roll(tensor: Any) -> Any:
    """Everything one token later."""
    return tensor.roll(1, dims=1)


def bare_view(original: Any) -> Any:
    """Every view is the bare base."""
    del original
    return lambda bank, view, options=None: bank.using(None, options=options)


def never_restored(original: Any) -> Any:
    """The adapter that was looked through stays active."""
    del original

    @contextlib.contextmanager
    def using(bank: Any, adapter: str | None, *, train: bool = False, options: Any = None) -> Iterator[Any]:
        bank.activate(adapter)
        bank._mounted[adapter].train(train)
        with contextlib.nullcontext() if options is None else bank.trunk.passing(options):
            yield bank.base

    return using


def reference_is_policy(original: Any) -> Any:
    """A reference on the shared base is seen through the policy."""
    from marl_core import View

    def mutated(bank: Any, reference: Any, *args: Any, **kwargs: Any) -> Any:
        return original(bank, View("policy") if isinstance(reference, View) else reference, *args, **kwargs)

    return mutated


def holds_all(original: Any) -> Any:
    """The optimizer is given every adapter of the bank, the frozen ones too."""

    def mutated(trained: Any, bank: Any) -> Any:
        roles = original(trained, bank)
        others = {name: p for adapter in bank.adapters for name, p in bank.parameters(adapter).items()}
        return {**roles, "policy": {**roles["policy"], **{k: p.requires_grad_() for k, p in others.items()}}}

    return mutated


def random_head(original: Any) -> Any:
    """A score head at random instead of the file's."""

    def mutated(files: Any, hidden_size: int, asked_by: str) -> Any:
        import torch

        head = original(files, hidden_size, asked_by)
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(3)))
        return head

    return mutated


def without_stop(original: Any) -> Any:
    """The stop token isn't counted (a response of nothing else keeps it)."""

    def mutated(ids: Any, stops: Any) -> Any:
        import torch

        mask, finished = original(ids, stops)
        is_stop = torch.isin(ids, torch.tensor(list(stops)))
        is_stop[:, 0] = False
        return mask & ~is_stop, finished

    return mutated


def forgets_value_head(original: Any) -> Any:
    """Resume leaves the value head as it is at a start."""

    def mutated(checkpoint: Any, bank: Any, trained: Any, optimizer: Any) -> Any:
        import torch

        before = {name: {k: p.detach().clone() for k, p in bank.parameters(name).items()} for name in bank.heads}
        state = original(checkpoint, bank, trained, optimizer)
        with torch.no_grad():
            for name, found in before.items():
                for key, value in found.items():
                    bank.parameters(name)[key].copy_(value)
        return state

    return mutated


def forgets_moments(original: Any) -> Any:
    """Resume leaves the optimizer's moments behind."""

    def mutated(checkpoint: Any, bank: Any, trained: Any, optimizer: Any) -> Any:
        state = original(checkpoint, bank, trained, optimizer)
        optimizer.state.clear()
        return state

    return mutated


def forgets_coefficient(original: Any) -> Any:
    """Resume starts with another KL coefficient than the run had."""
    from dataclasses import replace

    return lambda *args, **kwargs: replace(original(*args, **kwargs), kl_coef=0.2)


def drops_gradient_of_kept(original: Any) -> Any:
    """Scoring keeps the graph: the undecorated function runs with gradients on."""
    import torch

    def mutated(*args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            return original.__wrapped__(*args, **kwargs)

    return mutated


# -- the mutants --------------------------------------------------------------------------------------------------

OBJECTIVES, ADVANTAGES = "tests/unit/test_objectives.py", "tests/unit/test_advantages.py"
MOUNTING = "tests/unit/test_mounting.py"
UPDATE, SCORING, BANK = "tests/unit/test_update.py", "tests/unit/test_scoring.py", "tests/unit/test_bank.py"
REWARD, ROLLOUT, RESUME = "tests/unit/test_reward_adapter.py", "tests/unit/test_rollout.py", "tests/run/test_resume.py"
PREFLIGHT, INVARIANTS = "tests/run/test_preflight.py", "tests/invariants"
MOVED = "tests/run/test_moved_policy.py"

MUTANTS: list[tuple[str, str, Change, tuple[str, ...]]] = [
    # the mathematics
    ("sign of the KL", "kl_estimate", text("return -log_ratio", "return log_ratio"), (f"{OBJECTIVES}::TestKL",)),
    (
        "k2 without its half",
        "kl_estimate",
        text("log_ratio.square() / 2", "log_ratio.square()"),
        (f"{OBJECTIVES}::TestKL",),
    ),
    (
        "k3 of the other direction",
        "kl_estimate",
        text("torch.expm1(log_ratio) - log_ratio", "torch.expm1(-log_ratio) + log_ratio"),
        (f"{OBJECTIVES}::TestKL",),
    ),
    (
        "penalty as a bonus",
        "token_rewards",
        text("mask, -coef * kl", "mask, coef * kl"),
        (f"{OBJECTIVES}::TestTokenRewards",),
    ),
    (
        "score on the token before the last",
        "token_rewards",
        text("last[:, None]", "(last - 1).clamp(min=0)[:, None]"),
        (f"{OBJECTIVES}::TestTokenRewards",),
    ),
    (
        "score on the last column",
        "token_rewards",
        text("mask.flip(1).int().argmax(dim=1)", "0 * mask.int().argmax(dim=1)"),
        (f"{OBJECTIVES}::TestTokenRewards",),
    ),
    (
        "penalty also under the mask",
        "token_rewards",
        text("torch.where(mask, -coef * kl, torch.zeros_like(kl))", "-coef * kl"),
        (OBJECTIVES,),
    ),
    (
        "gamma forgotten",
        "generalized_advantage_estimation",
        text("gamma * next_value_B", "next_value_B"),
        (f"{OBJECTIVES}::TestGAE",),
    ),
    (
        "lambda forgotten",
        "generalized_advantage_estimation",
        text("gamma * lam * next_advantage_B", "gamma * next_advantage_B"),
        (f"{OBJECTIVES}::TestGAE",),
    ),
    (
        "value of a masked place used",
        "generalized_advantage_estimation",
        text("next_value_B = torch.where(counts_B, value_B, next_value_B)", "next_value_B = value_B"),
        (OBJECTIVES,),
    ),
    (
        "returns without the values",
        "generalized_advantage_estimation",
        text("advantages + values", "advantages"),
        (f"{OBJECTIVES}::TestGAE",),
    ),
    (
        "missing mask in a sum",
        "masked_sum",
        text("torch.where(mask, values, torch.zeros_like(values))", "values"),
        (OBJECTIVES,),
    ),
    (
        "mean over all places",
        "masked_mean",
        text(
            "count = mask.sum() if dim is None else mask.sum(dim=dim)",
            "count = torch.ones_like(mask).sum() if dim is None else torch.ones_like(mask).sum(dim=dim)",
        ),
        (OBJECTIVES,),
    ),
    (
        "whitening without its mean",
        "masked_whiten",
        text("(values - masked_mean(values, mask)) *", "values *"),
        (f"{OBJECTIVES}::TestWhitening",),
    ),
    (
        "whitening by the variance of all places",
        "masked_whiten",
        text("masked_var(values, mask)", "masked_var(values, torch.ones_like(mask))"),
        (f"{OBJECTIVES}::TestWhitening",),
    ),
    (
        "advantage not whitened",
        "_gae",
        text("masked_whiten(advantages, inputs.mask) if inputs.whiten else advantages", "advantages"),
        (ADVANTAGES,),
    ),
    (
        "an estimator writes where the update reads",
        "_inputs@marl_core.ppo.estimators",
        text("rewards=rewards.clone()", "rewards=rewards"),
        (ADVANTAGES,),
    ),
    (
        "a stranger's NaN passes",
        "_per_token",
        text("if inputs_are_finite and not _finite(result, mask)", "if False"),
        (ADVANTAGES,),
    ),
    (
        "one response is a group",
        "nothing_to_compare",
        text("samples_per_prompt >= 2", "samples_per_prompt >= 1"),
        (ADVANTAGES, "tests/unit/config/test_plan.py"),
    ),
    (
        "adaptive coefficient ignored",
        "estimate_advantages",
        text("ppo.kl.coef if kl_coef is None else kl_coef", "ppo.kl.coef"),
        (ADVANTAGES,),
    ),
    (
        "divisor of the minibatch ignored",
        "aggregate",
        text("mask.sum().clamp(min=1) if total is None else total", "mask.sum().clamp(min=1)"),
        (f"{OBJECTIVES}::TestAggregate",),
    ),
    (
        "clip on the wrong side",
        "policy_loss",
        text("torch.maximum(unclipped, clipped)", "torch.minimum(unclipped, clipped)"),
        (f"{OBJECTIVES}::TestPolicyLoss",),
    ),
    (
        "clip range swapped",
        "policy_loss",
        text("ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio.clamp(1 - clip_high, 1 + clip_low)"),
        (f"{OBJECTIVES}::TestPolicyLoss",),
    ),
    (
        "ratio upside down",
        "policy_loss",
        text("mask, logprobs - old_logprobs", "mask, old_logprobs - logprobs"),
        (f"{OBJECTIVES}::TestPolicyLoss",),
    ),
    (
        "dual clip of the good tokens",
        "policy_loss",
        text("advantages < 0", "advantages > 0"),
        (f"{OBJECTIVES}::TestPolicyLoss",),
    ),
    (
        "value clip takes the better of the two",
        "value_loss",
        text("torch.maximum(error, clipped_error)", "torch.minimum(error, clipped_error)"),
        (f"{OBJECTIVES}::TestValueLoss",),
    ),
    (
        "value clipped on one side only",
        "value_loss",
        text(
            "torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)",
            "torch.minimum(values, old_values + clip)",
        ),
        (f"{OBJECTIVES}::TestValueLoss",),
    ),
    (
        "own score in the leave-one-out mean",
        "rloo_advantages",
        text("(group - 1)", "group"),
        (f"{OBJECTIVES}::TestCriticFree",),
    ),
    (
        "group scores not scaled",
        "group_advantages",
        text(" / (scores_GK.std(dim=1, keepdim=True) + eps)", ""),
        (f"{OBJECTIVES}::TestCriticFree",),
    ),
    (
        "KL controller runs away",
        "adapt_kl_coef",
        text("kl_nats / target - 1.0", "1.0 - kl_nats / target"),
        (f"{OBJECTIVES}::TestAdaptiveCoefficient",),
    ),
    (
        "penalty for those that did stop",
        "penalized",
        text("(~finished)", "finished"),
        ("tests/unit/test_shaping.py",),
    ),
    (
        "running mean without its weight",
        "RewardStats.updated",
        text("delta * count / total", "delta"),
        ("tests/unit/test_shaping.py",),
    ),
    # the update
    (
        "clip-grad exhausts an iterator",
        "Update._optimizer_step",
        text("list(parameters.values())", "(lambda found: (list(found), found)[1])(iter(parameters.values()))"),
        (f"{UPDATE}::TestGradient",),
    ),
    (
        "gradients are never cleared",
        "Update._optimizer_step",
        text("self.optimizer.zero_grad(set_to_none=True)", "pass"),
        (UPDATE,),
    ),
    (
        "step before the check of the norm",
        "Update._optimizer_step",
        text("if not bool(norm.isfinite()):", "if False:"),
        (UPDATE,),
    ),
    (
        "loss that is not finite goes backward",
        "_backward",
        text("if not bool(loss.isfinite()):", "if False:"),
        (UPDATE, "tests/run/test_by_hand.py"),
    ),
    (
        "first epoch shuffled",
        "minibatches",
        given(generator=lambda old: old or __import__("torch").Generator().manual_seed(1)),
        (f"{UPDATE}::TestRatio",),
    ),
    ("microbatches averaged each by itself", "aggregate", given(total=None), (UPDATE,)),
    (
        "entropy bonus as a penalty",
        "Update._policy_loss",
        text("loss - ppo.entropy_coef", "loss + ppo.entropy_coef"),
        (f"{UPDATE}::TestGradient",),
    ),
    (
        "KL in the loss forgotten",
        "Update._policy_loss",
        text("loss + self.kl_coef * aggregate", "loss + 0.0 * aggregate"),
        (f"{UPDATE}::TestGradient",),
    ),
    ("optimizer holds a frozen adapter", "TrainableRoles.parameters", holds_all, (f"{INVARIANTS}/test_run.py",)),
    (
        "value learns at the policy's rate",
        "make_optimizer",
        text("rates.get(role, config.ppo.learning_rate)", "config.ppo.learning_rate"),
        ("tests/unit/test_optimizer.py",),
    ),
    (
        "warm-up starts at zero",
        "learning_rate_factor",
        text("(step + 1) / ppo.warmup_steps", "step / ppo.warmup_steps"),
        ("tests/unit/test_optimizer.py",),
    ),
    # the numbers of a rollout
    ("log-probs shifted by one", "response_hidden", gives(roll), (f"{SCORING}::TestLogprobs",)),
    ("missing attention mask", "Trunk.hidden", given(mask=lambda mask: mask | True), (f"{SCORING}::TestPadding",)),
    ("positions count the padding", "position_ids", given(mask=lambda mask: mask | True), (SCORING,)),
    (
        "temperature forgotten in scoring",
        "chosen_logprobs",
        given(temperature=1.0),
        (f"{SCORING}::TestLogprobs", ROLLOUT),
    ),
    (
        "entropy not of the sampled distribution",
        "logits_logprobs",
        given(temperature=1.0),
        ("tests/unit/test_logprobs.py",),
    ),
    ("stop token not counted", "response_mask", without_stop, (ROLLOUT,)),
    (
        "weight of a reward source ignored",
        "score_all",
        given(sources=lambda sources: [__import__("dataclasses").replace(s, weight=1.0) for s in sources]),
        (SCORING,),
    ),
    ("scoring keeps a graph", "view_output", drops_gradient_of_kept, (f"{SCORING}::TestReference", SCORING)),
    ("each epoch in the same order", "PromptData._order", given(epoch=0), ("tests/unit/test_prompts.py",)),
    # the bank
    ("wrong adapter active", "AdapterBank.view", bare_view, (f"{SCORING}::TestReference", PREFLIGHT)),
    (
        "reference seen through the policy",
        "reference_logprobs",
        reference_is_policy,
        ("tests/run/test_learning.py", f"{PREFLIGHT}::TestReference"),
    ),
    ("adapter stays active after a block", "AdapterBank.using", never_restored, (f"{BANK}::TestUsing",)),
    ("dropout on in every pass", "AdapterBank.using", given(train=True), (BANK,)),
    ("who is trained is left to peft", "AdapterBank._restore", nothing, (f"{BANK}::TestWhoIsTrained",)),
    ("adapters can't be switched off", "Mounted.take_off", nothing, (f"{BANK}::TestSwitch",)),
    (
        "another adapter's layers stand in the base",
        "AdapterBank._stand",
        text("self._mounted[adapter].put_on()", "next(iter(self._mounted.values())).put_on()"),
        (f"{MOUNTING}::test_two_kinds_at_once_learn_as_each_alone",),
    ),
    (
        "the layers of the last adapter stay",
        "AdapterBank._stand",
        text("if self._standing in self._mounted:", "if self._standing not in self._mounted:"),
        (f"{MOUNTING}::test_a_kind_beside_others_is_what_it_is_alone",),
    ),
    (
        "a removed adapter's layers stay",
        "AdapterBank.remove",
        text("self._stand(None)", "pass"),
        (f"{MOUNTING}::test_what_is_removed_while_it_stands_is_gone",),
    ),
    (
        "a copy shares its tensors",
        "AdapterBank.copy",
        lambda original: lambda bank, source, name: bank._mounted.__setitem__(name, bank._mounted[source]),
        (f"{MOUNTING}::test_a_copy_is_nobody_elses",),
    ),
    (
        "what is fixed in a kind learns",
        "Mounted.learning",
        lambda original: lambda mounted, name: mounted.parameters(name),
        (f"{MOUNTING}::test_what_peft_keeps_fixed_does_not_learn",),
    ),
    ("the base keeps its dropout", "_remove_dropout", nothing, (BANK,)),
    (
        "head skipped",
        "apply_head",
        call(lambda original, head, hidden: hidden.float().mean(-1)),
        (f"{REWARD}::TestAgainstTheClassifier",),
    ),
    ("score head at random", "read_score_head", random_head, (f"{REWARD}::TestAgainstTheClassifier",)),
    (
        "reward read at the wrong token",
        "score_positions",
        given(position="last-attended"),
        (f"{REWARD}::TestPosition",),
    ),
    (
        "reward read one token early",
        "score_positions",
        gives(lambda places: (places - 1).clamp(min=0)),
        (f"{REWARD}::TestPosition",),
    ),
    (
        "any base will do",
        "_differs@marl_core.bank.identity.fingerprint",
        call(lambda original, *args: (False, 0.0)),
        ("tests/unit/test_which_base.py::TestEveryKindAtEveryDepth",),
    ),
    (
        "a rewritten base isn't seen",
        "BaseGuard.changed",
        call(lambda original, *args: []),
        ("tests/unit/test_base_unchanged.py::TestMeasured",),
    ),
    (
        "anybody's log-probs will do",
        "PolicyOutput.is_of",
        call(lambda original, *args: True),
        ("tests/run/test_beside.py::TestWhoseLogProbs",),
    ),
    (
        "every model packs",
        "packing_fault@marl_core.bank.measure",
        call(lambda original, *args: None),
        ("tests/unit/test_rows_alone.py",),
    ),
    (
        "models that ignore the mask will do",
        "padding@marl_core.bank.measure",
        gives(lambda found: (found[0], None)),
        ("tests/unit/test_rows_alone.py",),
    ),
    ("adapter not merged", "merge_into", call(lambda original, base, *args: base), ("tests/unit/test_merge.py",)),
    (
        "missing tensors of an adapter are not seen",
        "load_weights@marl_core.bank.peft_adapters",
        text("if missing or extra or misfits:", "if extra or misfits:"),
        (BANK,),
    ),
    # guards and resume
    (
        "any reference will do",
        "_reference@marl_core.safety.preflight",
        text("mean <= allowed", "True"),
        (f"{PREFLIGHT}::TestReference",),
    ),
    (
        "any gradient will do",
        "_compare",
        text("if not cosine > MIN_COSINE:", "if False:"),
        (f"{PREFLIGHT}::TestQuantized",),
    ),
    (
        "a fresh policy is looked at",
        "first_move",
        gives(lambda moves: {name: 0 * move for name, move in moves.items()}),
        (f"{MOVED}::TestStep",),
    ),
    ("the policy stays where it was moved", "moved_policy", text("_write(parameters, before)", "pass"), (MOVED,)),
    ("any ratio will do", "ratio_check", text("if not error <= allowed", "if False"), (f"{MOVED}::TestFaults",)),
    ("any batch will do", "compare", text("if not gap <= EXACT_NATS:", "if False:"), (f"{MOVED}::TestFaults",)),
    ("packed rows aren't compared", "packed_check", nothing, (f"{MOVED}::TestFaults",)),
    ("sampling isn't compared", "sampled_check", nothing, (f"{MOVED}::TestFaults",)),
    ("any file will do", "file_check", text("if gap > noise:", "if False:"), (f"{MOVED}::TestFaults",)),
    ("any part may learn nothing", "refuse_no_gradient", nothing, (f"{MOVED}::TestGradient",)),
    (
        "a part that learns nothing isn't said",
        "reaches",
        text("if norm == 0.0]", "if False]"),
        (f"{MOVED}::TestGradient",),
    ),
    (
        "any step is right",
        "step_check",
        text("SMALL_STEP <= first.nats <= LARGE_STEP", "True"),
        (f"{MOVED}::TestStep",),
    ),
    ("resume forgets the value head", "load@marl_core.store.checkpoint", forgets_value_head, (RESUME,)),
    ("resume forgets the optimizer", "load@marl_core.store.checkpoint", forgets_moments, (RESUME,)),
    ("resume forgets the KL coefficient", "load@marl_core.store.checkpoint", forgets_coefficient, (RESUME,)),
    (
        "a seed that never changes",
        "derive_seed",
        call(lambda original, *parts: 1),
        (RESUME, "tests/unit/test_prompts.py"),
    ),
]
