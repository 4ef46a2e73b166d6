"""Each fast path gives the plain path's numbers: same tokens where nothing is drawn, same distribution where it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from marl_core import AdapterBank, Prompts, Rollout, RunConfig, Runner, View
from marl_core.bank.speed import packing
from marl_core.bank.speed.cache import RoomyLayer, new_cache
from marl_core.bank.speed.merged_copies import merged_copies
from marl_core.bank.trunk import PassOptions
from marl_core.config.run_config import SamplingSection, SpeedSection
from marl_core.ppo.budget import PassLimits
from marl_core.ppo.sampling import decode as decode_module
from marl_core.ppo.sampling.choose import choose, scored_logits
from marl_core.ppo.sampling.sampler import PolicySampler
from marl_core.ppo.scoring import blocks, view_output
from marl_core.testing import tiny_bank
from marl_core.testing.kinds import make_config as make_lora

EOS = 2
STOPS = [EOS, *range(4, 60)]  # stop often: lengths differ
PLAIN = SpeedSection(decode="transformers", merge_for_sampling=False, capture=False, pack=False)
DIRECTION = torch.randn(32, generator=torch.Generator().manual_seed(9))
MakeConfig = Callable[..., RunConfig]


def bank_with_policy(targets: Any = "all-linear", **changes: Any) -> AdapterBank:
    """A tiny bank whose policy is far from the base."""
    bank = tiny_bank(**changes)
    bank.add("policy", make_lora(4, 8, targets, 0.0, {}, bank.linears), seed=0)
    bank.add_value_head("value")
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in [*bank.parameters("policy").values(), *bank.parameters("value").values()]:
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
    return bank


@contextmanager
def positions(bank: AdapterBank) -> Iterator[list[int]]:
    """Token positions that go through the body inside, padding included, pass by pass."""
    seen: list[int] = []

    def note(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        seen.append(named["input_ids"].numel())

    hook = bank.trunk.body.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def bank() -> AdapterBank:
    return bank_with_policy()


@pytest.fixture
def prompts(bank: AdapterBank) -> Prompts:
    return Prompts.of([bank.tokenizer(text).input_ids for text in ("A good", "Bad", "I", "What a film")], 0)


class TestDecode:
    @pytest.mark.parametrize("stops", [[EOS], STOPS], ids=["few stops", "many stops"])
    def test_the_likeliest_tokens_are_those_of_transformers(
        self, bank: AdapterBank, prompts: Prompts, stops: list[int]
    ) -> None:
        greedy = SamplingSection(max_new_tokens=12, top_k=1)
        fast = PolicySampler(bank, "policy", greedy, tuple(stops))(prompts, 0)
        plain = PolicySampler(bank, "policy", greedy, tuple(stops), PLAIN)(prompts, 0)
        assert torch.equal(fast.mask, plain.mask)
        assert torch.equal(fast.ids[fast.mask], plain.ids[plain.mask])
        assert torch.equal(fast.finished, plain.finished)
        assert list(fast.texts) == list(plain.texts)

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    @pytest.mark.parametrize("least", [0, 3])
    def test_what_sampling_saw_is_what_a_scoring_pass_sees(
        self, bank: AdapterBank, prompts: Prompts, temperature: float, least: int
    ) -> None:
        """I24: 5e-6 on the plain tiny model; this policy's logits are four times as large (7e-6 was measured)."""
        sampling = SamplingSection(max_new_tokens=12, min_new_tokens=least, temperature=temperature)
        rollout = PolicySampler(bank, "policy", sampling, tuple(STOPS), value_head="value")(prompts.repeat(5), 3)
        assert len(set(rollout.lengths.tolist())) > 2  # rows did leave the batch
        passed = view_output(
            bank, View("policy"), rollout, temperature, PassLimits(20), value_head="value", entropy=True
        )
        assert rollout.behavior is not None
        assert passed.values is not None
        assert rollout.behavior.values is not None
        torch.testing.assert_close(rollout.behavior.logprobs, passed.logprobs, rtol=0, atol=2e-5)
        torch.testing.assert_close(rollout.behavior.entropy, passed.entropy, rtol=0, atol=2e-5)
        torch.testing.assert_close(rollout.behavior.values, passed.values, rtol=1e-4, atol=1e-4)

    def test_a_row_is_the_same_whoever_stands_beside_it(
        self, bank: AdapterBank, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sampling = SamplingSection(max_new_tokens=10)
        both = [PolicySampler(bank, "policy", sampling, tuple(STOPS))(prompts.repeat(4), 7)]
        for leaving in (1, 10**9):  # rows leave only when all are through; rows leave at once
            monkeypatch.setattr(decode_module, "ROWS_PER_FINISHED_ROW", leaving)
            both.append(PolicySampler(bank, "policy", sampling, tuple(STOPS))(prompts.repeat(4), 7))
        assert torch.equal(both[0].ids, both[1].ids)
        assert torch.equal(both[0].ids, both[2].ids)

    def test_samples_of_one_prompt_share_its_prefill(self, bank: AdapterBank, prompts: Prompts) -> None:
        sampling = SamplingSection(max_new_tokens=8)
        sampler = PolicySampler(bank, "policy", sampling, (EOS,))
        assert bank.trunk.sampler("marl") == "marl"  # measured once, and not inside
        with positions(bank) as with_shared:
            shared = sampler(prompts, 5, samples=3)
        with positions(bank) as each_alone:
            alone = sampler(prompts.repeat(3), 5)
        assert torch.equal(shared.ids, alone.ids)
        assert sum(each_alone) - sum(with_shared) == 2 * prompts.ids.numel()

    def test_finished_rows_are_not_computed(self, bank: AdapterBank, prompts: Prompts) -> None:
        many, limits = prompts.repeat(8), torch.arange(1, 33)
        sampling = SamplingSection(max_new_tokens=32, min_new_tokens=32)  # only the limits end a row
        assert bank.trunk.sampler("marl") == "marl"
        with positions(bank) as computed:
            rollout = PolicySampler(bank, "policy", sampling, (EOS,))(many, 1, limits=limits)
        assert torch.equal(rollout.lengths, limits)
        assert not bool(rollout.finished.any())
        real = many.ids.numel() + int((limits - 1).sum())
        assert sum(computed) <= 1.05 * real

    def test_half_precision_captures_nothing(self) -> None:
        """There a second pass is off by 0.1 nat: old log-probs must come from the update's own code path."""
        model: Any = tiny_bank().base
        half = AdapterBank(model.to(torch.bfloat16), tiny_bank().tokenizer)
        rollout = PolicySampler(half, None, SamplingSection(max_new_tokens=3), (EOS,))(Prompts.of([[5, 6]], 0), 0)
        assert rollout.behavior is None


class TestChoose:
    def test_by_hand(self) -> None:
        """Probabilities 0.1, 0.2, 0.7: below 0.1 the first token, below 0.3 the second."""
        logits = torch.tensor([[0.1, 0.2, 0.7]]).log().expand(6, 3)
        uniform = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.999999], dtype=torch.float64)
        tokens, found = choose(logits, uniform, SamplingSection())
        assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
        torch.testing.assert_close(found.logprobs.exp(), torch.tensor([0.1, 0.1, 0.2, 0.2, 0.7, 0.7]))
        # -(0.1 ln 0.1 + 0.2 ln 0.2 + 0.7 ln 0.7) = 0.801819
        torch.testing.assert_close(found.entropy, torch.full((6,), 0.801819), rtol=0, atol=1e-5)

    def test_frequencies_are_the_probabilities(self) -> None:
        logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)) * 2
        uniform = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        tokens, _ = choose(logits.expand(20_000, 20), uniform, SamplingSection())
        counts, expected = torch.bincount(tokens, minlength=20), logits.softmax(-1)[0] * 20_000
        chi_square = float(((counts - expected).square() / expected).sum())
        assert chi_square < 43.8  # 99.9 % of chi-square with 19 degrees of freedom

    def test_cuts_change_what_is_drawn_and_not_what_is_scored(self) -> None:
        logits = torch.tensor([[0.1, 0.2, 0.7]]).log().expand(50, 3)
        uniform = torch.linspace(0, 0.999, 50, dtype=torch.float64)
        for cut in (SamplingSection(top_k=1), SamplingSection(top_p=0.5)):
            tokens, found = choose(logits, uniform, cut)
            assert tokens.unique().tolist() == [2]
            torch.testing.assert_close(found.logprobs, torch.full((50,), 0.7).log())

    def test_a_banned_token_is_never_drawn(self) -> None:
        logits = scored_logits(torch.zeros(3, 4), 1.0, banned=[0, 3])
        tokens, found = choose(logits, torch.tensor([0.0, 0.5, 1.0 - 2**-53], dtype=torch.float64), SamplingSection())
        assert tokens.tolist() == [1, 2, 2]
        torch.testing.assert_close(found.logprobs, torch.full((3,), 0.5).log())


class TestMergedCopies:
    def test_copies_compute_what_the_adapter_does_and_the_base_stays(
        self, base_state: Callable[[AdapterBank], dict[str, Tensor]]
    ) -> None:
        bank = bank_with_policy(targets=["q_proj"])
        ids, mask = torch.arange(4, 24).reshape(2, 10), torch.ones(2, 10, dtype=torch.bool)
        before = base_state(bank)
        with torch.no_grad(), bank.using("policy"):
            plain = bank.trunk.hidden(ids, mask)
            with merged_copies(bank, "policy") as done:
                assert done
                fast = bank.trunk.hidden(ids, mask)
            again = bank.trunk.hidden(ids, mask)
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
        assert not torch.equal(fast, plain)  # it did take another way
        assert torch.equal(again, plain)
        after = base_state(bank)
        assert all(torch.equal(after[name], before[name]) for name in before)

    def test_copies_as_large_as_the_base_are_not_made(self, bank: AdapterBank) -> None:
        with merged_copies(bank, "policy") as done:
            assert not done

    def test_a_rollout_through_merged_copies_is_the_same_rollout(self, prompts: Prompts) -> None:
        bank, sampling = bank_with_policy(targets=["q_proj"]), SamplingSection(max_new_tokens=8)
        plain = PolicySampler(bank, "policy", sampling, (EOS,))(prompts, 2)
        fast = PolicySampler(bank, "policy", sampling, (EOS,), SpeedSection(merge_for_sampling=True))(prompts, 2)
        assert torch.equal(fast.ids, plain.ids)


@pytest.fixture
def ragged(bank: AdapterBank) -> Rollout:
    responses = [[9, 8, 7, 6, 5, 4, EOS], [9, EOS], [5, 6, 7, EOS], [7]]
    prompts = Prompts.of([[11, 12, 13], [14], [15, 16], [17, 18, 19, 20]], 0)
    return Rollout.from_responses(prompts, responses, bank.tokenizer)


class TestPacking:
    @pytest.fixture(params=[True, False], ids=["products", "sdpa"])
    def kernel(self, request: pytest.FixtureRequest, bank: AdapterBank) -> Iterator[None]:
        before = bank.trunk.options
        bank.trunk.options = replace(before, short_attention=request.param)
        yield
        bank.trunk.options = before

    def test_values_and_gradients_are_those_of_padded_rows(
        self, bank: AdapterBank, ragged: Rollout, kernel: None
    ) -> None:
        found = {}
        for pack in (True, False):
            bank.trunk.options = replace(bank.trunk.options, pack=pack)
            with bank.using("policy", train=True):
                hidden = bank.trunk.hidden(ragged.sequence_ids, ragged.sequence_mask)[ragged.sequence_mask]
                parameters = list(bank.parameters("policy").values())
                found[pack] = (hidden, *torch.autograd.grad((hidden @ DIRECTION).sum(), parameters))
        bank.trunk.options = replace(bank.trunk.options, pack=True)
        for fast, plain in zip(found[True], found[False], strict=True):
            torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4 * float(plain.detach().abs().max()))

    def test_padding_is_not_computed(self, bank: AdapterBank, ragged: Rollout) -> None:
        bank.trunk.hidden(ragged.sequence_ids, ragged.sequence_mask)
        with positions(bank) as computed:
            bank.trunk.hidden(ragged.sequence_ids, ragged.sequence_mask)
        assert sum(computed) == int(ragged.sequence_mask.sum())

    def test_gradient_checkpointing_recomputes_with_the_same_layout(self, ragged: Rollout) -> None:
        """Another layout is active by the time backward recomputes: the first one's must be used."""
        gradients = []
        for checkpointing in (False, True):
            bank = bank_with_policy()
            if checkpointing:
                bank.trunk.options = bank.trunk.prepare(PassOptions(recompute=True))
            with bank.using("policy", train=True):
                hidden = bank.trunk.hidden(ragged.sequence_ids, ragged.sequence_mask)[ragged.sequence_mask]
                with torch.no_grad():
                    bank.trunk.hidden(ragged.sequence_ids[:2], ragged.sequence_mask[:2])
                parameters = list(bank.parameters("policy").values())
                gradients.append(torch.autograd.grad((hidden @ DIRECTION).sum(), parameters))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(one.abs().max()))

    @pytest.mark.parametrize("window", [4, 8])
    def test_rows_longer_than_a_window_stay_padded(self, window: int) -> None:
        """Mistral's layers see the last `window` tokens; a packed row would see all of its own."""
        from transformers import MistralConfig, MistralForCausalLM

        torch.manual_seed(0)
        shape: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        model = MistralForCausalLM(
            MistralConfig(**shape, num_key_value_heads=2, vocab_size=260, sliding_window=window, initializer_range=0.3)
        )
        bank = AdapterBank(model.eval(), tiny_bank().tokenizer)
        ids, mask = torch.arange(4, 24).reshape(2, 10), torch.ones(2, 10, dtype=torch.bool)
        mask[1, 6:] = False
        with torch.no_grad():
            bank.trunk.options = replace(bank.trunk.options, pack=False)
            plain = bank.trunk.hidden(ids, mask)[mask]
            bank.trunk.options = replace(bank.trunk.options, pack=True)
            torch.testing.assert_close(bank.trunk.hidden(ids, mask)[mask], plain, rtol=0, atol=1e-5)


class TestShortAttention:
    """`speed.short_attention`: rows of up to 256 tokens by explicit products, where rows are packed."""

    @pytest.fixture
    def products(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Lengths of the rows whose attention was computed by explicit products."""
        seen: list[int] = []
        plain = packing._products

        def noted(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
            seen.append(key.shape[2])
            return plain(query, key, value, scaling)

        monkeypatch.setattr(packing, "_products", noted)
        return seen

    def test_off_is_the_plain_path_and_the_numbers_are_the_same(
        self, bank: AdapterBank, ragged: Rollout, products: list[int]
    ) -> None:
        found = {}
        for short in (True, False):
            with bank.trunk.passing(PassOptions(short_attention=short)), bank.using("policy", train=True):
                hidden = bank.trunk.hidden(ragged.sequence_ids, ragged.sequence_mask)[ragged.sequence_mask]
                parameters = list(bank.parameters("policy").values())
                found[short] = (hidden, *torch.autograd.grad((hidden @ DIRECTION).sum(), parameters))
            assert bool(products) is short
            products.clear()
        for fast, plain in zip(found[True], found[False], strict=True):
            torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4 * float(plain.detach().abs().max()))
        assert not all(torch.equal(fast, plain) for fast, plain in zip(found[True], found[False], strict=True))

    @pytest.mark.parametrize(("asked", "taken"), [(None, True), (True, True), (False, False)])
    def test_a_run_takes_what_its_config_says(
        self, make_config: MakeConfig, products: list[int], asked: bool | None, taken: bool
    ) -> None:
        runner = Runner(make_config(speed={"short_attention": asked}))
        products.clear()  # the model is measured either way
        next(runner.steps())
        assert bool(products) is taken

    def test_longer_rows_take_the_fused_kernel(
        self, bank: AdapterBank, products: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(packing, "SHORT_KEYS", 4)
        bank.trunk.hidden(torch.arange(4, 9)[None], torch.ones(1, 5, dtype=torch.bool))
        assert products == []

    def test_gradient_checkpointing_recomputes_by_the_same_function(self, ragged: Rollout, products: list[int]) -> None:
        bank = bank_with_policy()
        options = bank.trunk.prepare(PassOptions(recompute=True, short_attention=False))
        products.clear()
        with bank.trunk.passing(options), bank.using("policy", train=True):
            hidden = bank.trunk.hidden(ragged.sequence_ids, ragged.sequence_mask)[ragged.sequence_mask]
            torch.autograd.grad((hidden @ DIRECTION).sum(), list(bank.parameters("policy").values()))
        assert products == []


class TestTrimMemory:
    """`speed.trim_memory`: freed memory goes back to the system between phases."""

    @pytest.mark.parametrize(("asked", "taken"), [(None, True), (True, True), (False, False)])
    def test_a_run_takes_what_its_config_says(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, asked: bool | None, taken: bool
    ) -> None:
        calls: list[None] = []
        monkeypatch.setattr("marl_core.run.runner.trim_heap", lambda: calls.append(None))
        next(Runner(make_config(speed={"trim_memory": asked})).steps())
        assert bool(calls) is taken

    def test_a_runner_leaves_the_environment_alone(self, make_config: MakeConfig) -> None:
        before = dict(os.environ)
        next(Runner(make_config(speed={"trim_memory": True})).steps())
        assert dict(os.environ) == before

    def test_it_changes_no_number(self, make_config: MakeConfig) -> None:
        def numbers(trim: bool) -> list[dict[str, float]]:
            steps = Runner(make_config(speed={"trim_memory": trim})).steps()
            return [{k: v for k, v in stats.metrics.items() if not k.startswith("perf/")} for stats in steps]

        assert numbers(True) == numbers(False)


class TestBlocks:
    @pytest.mark.parametrize(
        ("size", "tokens", "wanted"),
        [
            (2, None, [(0, 2), (2, 4), (4, 5)]),
            (5, 10, [(0, 2), (2, 3), (3, 5)]),  # 4+6 | 12 stands alone | 3+5
            (5, 29, [(0, 2), (2, 5)]),  # two blocks either way: 4+6 | 12+3+5 is more even than 4+6+12+3 | 5
            (3, 100, [(0, 3), (3, 5)]),
            (4, 1, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
        ],
    )
    def test_rows_and_tokens(self, size: int, tokens: int | None, wanted: list[tuple[int, int]]) -> None:
        assert [(rows.start, rows.stop) for rows in blocks([4, 6, 12, 3, 5], size, tokens)] == wanted

    @pytest.mark.parametrize("capture", [True, False])
    def test_a_budget_of_tokens_changes_rounding_only(self, make_config: MakeConfig, capture: bool) -> None:
        """The same first minibatch, whole or in pieces; without capture its ratio is 1 bitwise either way (I2, I11)."""
        found = []
        for budget in (10_000, 20):
            runner = Runner(make_config(speed={"microbatch_tokens": budget, "capture": capture}))
            assert runner.data is not None
            scored = runner.score(runner.generate(runner.data.batch(0, runner.config.ppo.batch, 0)))
            found.append(runner.update(scored))
        assert found[0].policy_grad_norm == pytest.approx(found[1].policy_grad_norm, rel=1e-4)
        assert found[0].policy_loss == pytest.approx(found[1].policy_loss, abs=1e-5)
        assert capture or found[0].first_ratio_error == found[1].first_ratio_error == 0.0

    @pytest.mark.parametrize(("dtype", "tokens"), [("float32", 256), ("bfloat16", 512)])
    def test_half_precision_takes_twice_the_tokens(self, make_config: MakeConfig, dtype: str, tokens: int) -> None:
        runner = Runner(make_config(model={"dtype": dtype}))
        assert runner.algorithm.budget.train.tokens == tokens


def test_a_cache_with_room_holds_what_a_growing_one_does(bank: AdapterBank) -> None:
    from transformers import DynamicCache

    config = bank.base.config
    roomy, growing = new_cache(config, 9), DynamicCache(config=config)
    assert all(isinstance(layer, RoomyLayer) for layer in roomy.layers)
    ids = torch.arange(4, 16).reshape(2, 6)
    with torch.no_grad():
        for piece, seen in ((ids[:, :4], 4), (ids[:, 4:], 6)):
            mask = torch.ones(2, seen, dtype=torch.bool)
            assert torch.equal(bank.trunk.extend(piece, mask, roomy), bank.trunk.extend(piece, mask, growing))
    for cache in (roomy, growing):
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(3)
    layers: list[Any] = [*zip(roomy.layers, growing.layers, strict=True)]
    assert all(torch.equal(one.keys, other.keys) for one, other in layers)


def test_a_run_on_the_fast_paths_is_the_run_on_the_plain_ones(make_config: MakeConfig) -> None:
    """Given the same responses, the scored numbers and the first update agree to float32 rounding (I2, I24)."""
    off = {
        "decode": "transformers",
        "merge_for_sampling": False,
        "capture": False,
        "pack": False,
        "recompute_cheap": False,
        "short_attention": False,
        "trim_memory": False,
    }
    fast, plain = Runner(make_config()), Runner(make_config(speed=off))
    assert fast.data is not None
    rollout = fast.generate(fast.data.batch(0, fast.config.ppo.batch, 0))
    scored = [fast.score(rollout), plain.score(replace(rollout, behavior=None))]
    torch.testing.assert_close(scored[0].logprobs, scored[1].logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(scored[0].shaped_scores, scored[1].shaped_scores, rtol=0, atol=1e-5)
    updates = [fast.update(scored[0]), plain.update(scored[1])]
    assert updates[0].policy_loss == pytest.approx(updates[1].policy_loss, abs=1e-4)
    assert updates[0].policy_grad_norm == pytest.approx(updates[1].policy_grad_norm, rel=1e-3)
