"""Invariants of a whole run, on the tiny model and (nightly) on a real one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from marl_core import AdapterBank, Runner, View
from marl_core.ppo.budget import PassLimits
from marl_core.ppo.estimators import estimate_advantages
from marl_core.ppo.scoring import view_output
from marl_core.ppo.types import Prompts, Rollout, ScoredRollout

State = Callable[[AdapterBank], dict[str, Tensor]]
BASES: dict[str, dict[str, Any]] = {  # dtype of the base, and how it is held
    "float32": {"model": {"dtype": "float32"}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "int8": {"model": {"dtype": "float32"}, "quantization": "bnb-8bit"},
    "nf4": {"model": {"dtype": "float32"}, "quantization": "bnb-4bit"},
}


def merged(*sections: dict[str, Any]) -> dict[str, Any]:
    """Sections of a config, the later over the earlier, one level deep."""
    result: dict[str, Any] = {}
    for section in sections:
        for key, value in section.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = {**result[key], **value} if both else value
    return result


def prompts(runner: Runner) -> Prompts:
    assert runner.data is not None
    return runner.data.batch(0, runner.config.ppo.batch, 0)


def scored(runner: Runner) -> ScoredRollout:
    """The first batch, sampled and scored."""
    return runner.score(runner.generate(prompts(runner)))


def move(runner: Runner) -> None:
    """Trained weights that are not zero, so that adapters and value head do something; after the pre-flight check."""
    runner.prepare()
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameters in runner.roles.trained.parameters(runner.bank).values():
            for parameter in parameters.values():
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.05)


def gradients(runner: Runner, batch: ScoredRollout) -> list[dict[str, Tensor]]:
    """What each optimizer step of one update was given, by the name of the role and of the tensor."""
    steps: list[dict[str, Tensor]] = []
    named = {
        f"{role}/{key}": p
        for role, found in runner.roles.trained.parameters(runner.bank).items()
        for key, p in found.items()
    }
    hook = runner.optimizer.register_step_pre_hook(
        lambda *_: steps.append({key: p.grad.clone() for key, p in named.items() if p.grad is not None})
    )
    runner.update(batch)
    hook.remove()
    return steps


def flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([found[name].flatten() for name in sorted(found)])


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Relative distance of two gradients."""
    return float((flat(one) - flat(other)).norm() / flat(other).norm())


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def different(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not bitwise the same."""
    assert before.keys() == after.keys()
    return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("line", ["new-on-base", "new-on-merged", "copy-of-sft"])
def test_i01_step_0_kl_is_bitwise_zero(world: Any, line: str, base: str) -> None:
    batch = scored(Runner(world.make(**merged(BASES[base], world.right_lines()[line]))))
    assert batch.ref_logprobs is not None
    assert torch.equal(batch.logprobs, batch.ref_logprobs)
    assert float(batch.logprobs.min()) < -0.5


@pytest.mark.parametrize("pieces", [{"minibatch": 4}, {"minibatch": 4, "microbatch": 1}, {"minibatch": 2}])
@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_i02_first_ratio_is_bitwise_one(world: Any, base: str, pieces: dict[str, int]) -> None:
    """bfloat16 too: the pass that trains is the pass that scored, over the same pieces."""
    runner = Runner(world.make(**merged(BASES[base], {"ppo": {"batch": 4, "epochs": 1, **pieces}})))
    move(runner)
    assert runner.update(scored(runner)).first_ratio_error == 0.0


def test_i02_captured_log_probs_round_within_the_tolerance(world: Any) -> None:
    """With log-probs taken from sampling, float32 only, step-0 KL and ratio are exact up to the rounding of I24."""
    runner = Runner(world.make(speed={"capture": True}, ppo={"batch": 4, "minibatch": 4, "epochs": 1}))
    runner.prepare()
    batch = scored(runner)
    assert batch.ref_logprobs is not None
    assert float((batch.logprobs - batch.ref_logprobs).abs().max()) < world.sampled
    assert runner.update(batch).first_ratio_error < world.sampled


def test_i02_other_pieces_round_within_the_tolerance(world: Any) -> None:
    runner = Runner(world.make(ppo={"batch": 4, "minibatch": 4}))
    move(runner)
    batch = scored(runner)
    alone = view_output(runner.bank, View("policy"), batch.rollout, 1.0, PassLimits(1)).logprobs
    torch.testing.assert_close(alone, batch.logprobs, rtol=world.rows, atol=world.rows)


def test_i03_without_a_learning_rate_nothing_happens(world: Any) -> None:
    """1e-60 is zero once it meets float32. Later epochs shuffle, so their ratios round as other pieces do (I2)."""
    runner = Runner(world.make(ppo={"steps": 3, "learning_rate": 1e-60}))
    before = copies(runner.bank.tensors("policy"))
    for stats in runner.steps():
        assert stats["policy/first_ratio_error"] == 0.0
        assert abs(stats["policy/ratio_max"] - 1) < world.rows
        assert abs(stats["policy/ratio_min"] - 1) < world.rows
        assert stats["objective/kl"] == 0.0
    assert different(before, runner.bank.tensors("policy")) == []


def padded(rollout: Rollout, left: int, right: int, token: int) -> Rollout:
    """The same responses with more padding, of any token, on both sides."""
    p, pad = rollout.prompts, torch.nn.functional.pad
    more = Prompts(pad(p.ids, (left, 0), value=token), pad(p.mask, (left, 0)), p.rows, p.texts)
    ids, mask = pad(rollout.ids, (0, right), value=token), pad(rollout.mask, (0, right))
    return replace(rollout, prompts=more, ids=ids, mask=mask)


def numbers(batch: ScoredRollout) -> list[Tensor]:
    """Log-probs and values of the tokens that count, and the rewards."""
    assert batch.values is not None
    return [batch.logprobs[batch.rollout.mask], batch.values[batch.rollout.mask], batch.scores]


@pytest.mark.parametrize(("left", "right"), [(5, 0), (0, 5), (3, 4)])
def test_i04_padding_changes_nothing(world: Any, left: int, right: int) -> None:
    runner = Runner(world.make(reward={"use": "adapter", "path": world.reward}))
    move(runner)
    batch = scored(runner)
    more = runner.score(padded(batch.rollout, left, right, 7))
    for found, expected in zip(numbers(more), numbers(batch), strict=True):
        torch.testing.assert_close(found, expected, rtol=world.rows, atol=world.rows)


def test_i04_alone_is_in_a_batch(world: Any) -> None:
    runner = Runner(world.make(reward={"use": "adapter", "path": world.reward}))
    move(runner)
    batch = scored(runner)
    rows = [runner.score(batch.rollout.select(slice(i, i + 1))) for i in range(len(batch.rollout))]
    for kind, whole in enumerate(numbers(batch)):
        alone = torch.cat([numbers(row)[kind] for row in rows])
        torch.testing.assert_close(alone, whole, rtol=world.rows, atol=world.rows)


def test_i05_garbage_under_the_mask_changes_nothing(world: Any) -> None:
    """Other ids under the mask score the same, and NaN there never reaches an advantage, a loss or a weight: bitwise."""
    ends: list[dict[str, Tensor]] = []
    for garbage in (False, True):
        runner = Runner(world.make(ppo={"minibatch": 4, "max_grad_norm": None}))
        move(runner)
        rollout = padded(runner.generate(prompts(runner)), 2, 3, 9 if garbage else 0)
        batch = runner.score(rollout)
        if garbage:
            nan = {
                name: tensor.masked_fill(~rollout.mask, float("nan"))
                for name in ("logprobs", "ref_logprobs", "values", "entropy")
                if (tensor := getattr(batch, name)) is not None
            }
            batch = replace(batch, **nan)
        advantages = estimate_advantages(batch, runner.config.ppo)
        runner.update(batch, advantages)
        ends.append(copies(runner.bank.tensors("policy")) | {"A": advantages.advantages, "R": advantages.rewards})
    assert different(*ends) == []


@pytest.mark.parametrize("base", BASES)
def test_i06_the_base_is_bitwise_the_same_after_training(world: Any, base: str, base_state: State) -> None:
    """Quantized: the packed bytes, scales and code books."""
    runner = Runner(world.make(**merged(BASES[base], {"ppo": {"steps": 2}})))
    before, policy = base_state(runner.bank), copies(runner.bank.tensors("policy"))
    assert len(list(runner.steps())) == 2
    assert different(before, base_state(runner.bank)) == []
    assert different(policy, runner.bank.tensors("policy"))


def test_i07_frozen_roles_are_never_touched(world: Any) -> None:
    """Reward and reference adapters and the score head: bitwise, their version counters too, at every step."""
    runner = Runner(
        world.make(
            reward={"use": "adapter", "path": world.reward}, ppo={"steps": 2}, **world.right_lines()["copy-of-sft"]
        )
    )
    bank = runner.bank
    frozen = {
        f"{name}/{key}": p
        for name in ("reward", "reference", "reward-score")
        for key, p in bank.parameters(name).items()
    }
    before, versions = copies(dict(frozen)), {name: p._version for name, p in frozen.items()}
    for _ in runner.steps():
        assert {name: p._version for name, p in frozen.items()} == versions
        assert not any(p.requires_grad or p.grad is not None for p in frozen.values())
    assert different(before, dict(frozen)) == []


@pytest.mark.parametrize("where", ["policy", "own"])
def test_i08_the_optimizer_holds_the_trained_and_nobody_else(world: Any, where: str) -> None:
    """Exactly policy and value; in step 1 each LoRA B has a gradient (A has none before B moves), and so has the head."""
    runner = Runner(world.make(reward={"use": "adapter", "path": world.reward}, value={"on": where}, ppo={"steps": 2}))
    bank = runner.bank
    own = ["policy-value"] if where == "own" else []
    named = ["policy", "policy-value-head", *own]
    expected = {id(p): f"{name}/{key}" for name in named for key, p in bank.parameters(name).items()}
    held = [id(p) for group in runner.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(expected)
    assert len(set(held)) == len(held)
    learning = {id(p) for p in bank.all_parameters().values() if p.requires_grad}
    assert learning == {id(p) for name in ["policy", *own] for p in bank.parameters(name).values()}
    steps = gradients(runner, scored(runner))
    moved = {name for step in steps for name, gradient in step.items() if torch.count_nonzero(gradient)}
    assert {name for name in steps[0] if "lora_B" in name and name.startswith("policy/")} <= moved
    assert any(name.endswith("head.bias") for name in moved)
    assert all(
        torch.count_nonzero(steps[0][name]) for name in steps[0] if "lora_B" in name and name.startswith("policy/")
    )


@pytest.mark.parametrize("base", BASES)
def test_i09_a_gradient_survives_a_rollout(world: Any, base: str) -> None:
    numbers = Runner(world.make(**BASES[base])).built.gradient.numbers
    assert numbers["cosine"] > 0.9999
    assert numbers["relative_error"] < 1e-6


def test_i10_gradient_checkpointing_changes_no_gradient(world: Any) -> None:
    found = []
    for checkpointing in (False, True):
        runner = Runner(world.make(model={"gradient_checkpointing": checkpointing}, ppo={"minibatch": 4, "epochs": 1}))
        move(runner)
        found.append(gradients(runner, scored(runner))[0])
    assert distance(found[1], found[0]) < world.gradient


@pytest.mark.parametrize("microbatch", [1, 2])
def test_i11_microbatches_add_up_to_the_minibatch(world: Any, microbatch: int) -> None:
    """Uneven responses; token-mean over the whole minibatch."""
    found = []
    for size in (None, microbatch):
        runner = Runner(
            world.make(ppo={"batch": 4, "minibatch": 4, "microbatch": size, "epochs": 1, "max_grad_norm": None})
        )
        move(runner)
        stop = int(runner.bank.tokenizer.eos_token_id)
        rows = [[40, 41, 42, 43, 44], [50], [60, 61, stop], [70, 71]]
        rollout = Rollout.from_responses(prompts(runner), rows, runner.bank.tokenizer)
        batch = runner.score(rollout, [1.0, -1.0, 2.0, 0.5])
        found.append(gradients(runner, batch)[0])
    assert distance(found[1], found[0]) < world.gradient


def test_i16_a_mixed_batch_is_separate_passes(world: Any, tmp_path: Path) -> None:
    """PEFT's mixed batch of the adapters' own files: rows through policy, reward and bare base in one forward.

    Bitwise on the tiny model; the real one's larger matrix products round by the number of rows.
    """
    runner = Runner(world.make(reward={"use": "adapter", "path": world.reward}))
    move(runner)
    rollout = runner.generate(prompts(runner))
    ids, mask = rollout.sequence_ids[:3], rollout.sequence_mask[:3].long()
    views: list[str | None] = ["policy", "reward", None]
    separate = []
    with torch.no_grad():
        for row, view in enumerate(views):
            with runner.bank.using(view) as model:
                separate.append(model(input_ids=ids, attention_mask=mask).logits[row])
        for name in ("policy", "reward"):
            runner.bank.save(name, tmp_path / name)
        plain: Any = AutoModelForCausalLM.from_pretrained(runner.bank.source, dtype=torch.float32)
        peft: Any = PeftModel.from_pretrained(plain, str(tmp_path / "policy"), adapter_name="policy")
        peft.load_adapter(str(tmp_path / "reward"), "reward")
        mixed = peft.eval()(
            input_ids=ids, attention_mask=mask, adapter_names=[view or "__base__" for view in views]
        ).logits
    real = mask.bool()
    gaps = [float((mixed[row] - separate[row])[real[row]].abs().max()) for row in range(3)]
    assert max(gaps) <= (0.0 if world.name == "tiny" else 1e-5 * float(mixed.abs().max()))
    assert not torch.equal(separate[0], separate[1])


def test_i18_save_and_load_is_bitwise(world: Any, tmp_path: Path) -> None:
    """Log-probs and values through the saved and reloaded adapter and head, rewards through the reloaded reward adapter."""
    settings = {"reward": {"use": "adapter", "path": world.reward}, "ppo": {"steps": 1}}
    run = {"folder": str(tmp_path / "run"), "checkpoint_every": 1}
    runner = Runner(world.make(**merged(settings, {"run": run})))
    list(runner.steps())
    again = Runner(world.make(**merged(settings, {"run": run})), resume=True)
    rollout = runner.generate(prompts(runner))
    one, other = runner.score(rollout), again.score(rollout)
    assert one.values is not None
    assert float(one.values.abs().max()) > 0
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(numbers(one), numbers(other), strict=True))


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default.", ".")


def test_i19_plain_peft_and_transformers_read_the_policy(world: Any, tmp_path: Path) -> None:
    """The exported tensors bitwise; logits within 1e-5 of their size (the bank's attention isn't transformers' own, so
    sums are taken in another order); merged into the base in float32 within 1e-4.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    runner = Runner(world.make())
    move(runner)
    runner.bank.save("policy", tmp_path / "policy")
    trained = {name.replace(".policy.", "."): p for name, p in runner.bank.parameters("policy").items()}
    ids = prompts(runner).ids[:1]
    with torch.no_grad():
        with runner.bank.using("policy") as model:
            expected = model(input_ids=ids).logits
        base: Any = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32).eval()
        plain: Any = PeftModel.from_pretrained(base, str(tmp_path / "policy")).eval()
        assert float((plain(input_ids=ids).logits - expected).abs().max()) < 1e-5 * float(expected.abs().max())
        exported = {name: p for name, p in plain.named_parameters() if "lora_" in name}
        assert [p for name, p in exported.items() if not torch.equal(p, trained[_plain_name(name)])] == []
        by_name: Any = AutoModelForCausalLM.from_pretrained(str(tmp_path / "policy"), dtype=torch.float32).eval()
        assert torch.equal(by_name(input_ids=ids).logits, plain(input_ids=ids).logits)
        plain.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged_model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        gap = float((merged_model(input_ids=ids).logits - expected).abs().max())
    assert gap < 1e-4 * max(1.0, float(expected.abs().max()))


def test_i24_generation_and_scoring_see_the_same_distribution(world: Any) -> None:
    runner = Runner(world.make())
    move(runner)
    some = prompts(runner)
    temperature = 0.7
    with torch.no_grad(), runner.bank.using("policy"), runner.bank.trunk.generating() as model:
        torch.manual_seed(1)
        generate: Any = model.generate
        out = generate(
            input_ids=some.ids, attention_mask=some.mask.long(), max_new_tokens=5, min_new_tokens=5, do_sample=True,
            top_k=0, temperature=temperature, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
    ids = out.sequences[:, some.ids.shape[1] :]
    captured = (
        (torch.stack(out.logits, dim=1).float() / temperature).log_softmax(-1).gather(2, ids[:, :, None])[:, :, 0]
    )
    ones = torch.ones_like(ids, dtype=torch.bool)
    rollout = Rollout(some, ids, ones, [""] * len(some), torch.zeros(len(some), dtype=torch.bool))
    found = view_output(runner.bank, View("policy"), rollout, temperature, PassLimits(2)).logprobs
    assert float((found - captured).abs().max()) < world.sampled


def test_i26_rewards_add_up_to_what_is_logged(world: Any) -> None:
    """Score minus penalty, per response and in the metrics; the score stands on the last response token alone."""
    runner = Runner(world.make(ppo={"kl": {"coef": 0.3}}))
    move(runner)
    batch = scored(runner)
    assert batch.ref_logprobs is not None
    mask = batch.rollout.mask
    advantages = estimate_advantages(batch, runner.config.ppo)
    penalty = -0.3 * (batch.logprobs - batch.ref_logprobs).masked_fill(~mask, 0.0)
    rest = advantages.rewards - penalty
    last = batch.rollout.lengths - 1
    rows = torch.arange(len(last))
    torch.testing.assert_close(rest[rows, last], batch.shaped_scores, rtol=0, atol=1e-6)
    rest[rows, last] = 0.0
    assert float(rest.abs().max()) <= 1e-6
    totals = advantages.rewards.sum(dim=1)
    stats = runner.finish(batch, advantages, runner.update(batch, advantages))
    assert stats["objective/rlhf_reward"] == pytest.approx(float(totals.mean()), abs=1e-5)
    assert float(penalty.abs().sum()) > 0.01
