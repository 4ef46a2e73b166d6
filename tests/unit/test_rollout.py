"""Sampling: where a response ends, what a seed fixes, and that what is sampled is what is scored."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from marl_core import AdapterBank, ConfigError, Prompts
from marl_core.bank.views import View
from marl_core.config.run_config import SamplingSection
from marl_core.ppo.budget import PassLimits
from marl_core.ppo.sampling.sampler import PolicySampler
from marl_core.ppo.sampling.stop_tokens import response_mask, stop_ids
from marl_core.ppo.scoring import view_output
from marl_core.testing import tiny_bank, tiny_model, tiny_tokenizer
from marl_core.testing.kinds import make_config

EOS = 2


@pytest.fixture(scope="module")
def bank() -> AdapterBank:
    return tiny_bank()


@pytest.fixture
def prompts(bank: AdapterBank) -> Prompts:
    return Prompts.of([bank.tokenizer(text).input_ids for text in ("A good", "Bad", "I")], 0)


class TestMask:
    def test_up_to_and_including_the_first_stop(self) -> None:
        ids = torch.tensor([[7, 2, 7, 2], [2, 2, 2, 2], [7, 7, 7, 7], [7, 7, 7, 2]])
        mask, finished = response_mask(ids, [2])
        assert mask.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
        assert finished.tolist() == [True, True, False, True]

    def test_any_of_several_stops(self) -> None:
        mask, _ = response_mask(torch.tensor([[7, 9, 2, 7]]), [2, 9])
        assert mask.tolist() == [[1, 1, 0, 0]]


class TestStops:
    def test_eos_and_further_stops(self) -> None:
        words = tiny_tokenizer()
        (bang,) = words("!").input_ids
        assert stop_ids(words, SamplingSection(), None) == [EOS]
        assert stop_ids(words, SamplingSection(stop=["!"]), [EOS, 1]) == sorted([EOS, 1, bang])

    def test_a_stop_of_several_tokens_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"sampling.stop: 'ab' is 2 tokens"):
            stop_ids(tiny_tokenizer(), SamplingSection(stop=["ab"]), None)

    def test_no_stop_at_all_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="no EOS token"):
            stop_ids(SimpleNamespace(eos_token_id=None), SamplingSection(), None)  # type: ignore[arg-type]  # a stand-in


class TestGenerate:
    def test_tokens_after_the_stop_do_not_count(self, bank: AdapterBank, prompts: Prompts) -> None:
        many = prompts.repeat(20)
        stops = [EOS, *range(4, 100)]  # stop often
        rollout = PolicySampler(bank, None, SamplingSection(max_new_tokens=8), tuple(stops))(many, 1)
        is_stop = torch.isin(rollout.ids, torch.tensor(stops)) & rollout.mask
        assert 0 < int(rollout.finished.sum()) < len(many)
        assert torch.equal(
            is_stop.sum(1), rollout.finished.long()
        )  # one stop in each finished response, none in others
        last = rollout.lengths - 1
        assert torch.equal(
            is_stop.gather(1, last[:, None]).squeeze(1), rollout.finished
        )  # and it is the last that counts
        assert int(rollout.lengths[~rollout.finished].min()) == rollout.ids.shape[1]

    def test_pad_equal_to_eos_still_counts_the_stop(self, prompts: Prompts) -> None:
        bank = AdapterBank(tiny_model(), tiny_tokenizer(pad_is_eos=True))
        stops = [EOS, *range(4, 100)]
        same = PolicySampler(tiny_bank(), None, SamplingSection(max_new_tokens=8), tuple(stops))(prompts.repeat(10), 1)
        rollout = PolicySampler(bank, None, SamplingSection(max_new_tokens=8), tuple(stops))(prompts.repeat(10), 1)
        assert torch.equal(rollout.mask, same.mask)
        assert torch.equal(rollout.ids[rollout.mask], same.ids[same.mask])

    def test_a_seed_fixes_the_result_and_leaves_the_global_random_state(
        self, bank: AdapterBank, prompts: Prompts
    ) -> None:
        before = torch.get_rng_state()
        one = PolicySampler(bank, None, SamplingSection(max_new_tokens=8), (EOS,))(prompts, 5)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(123)
        two = PolicySampler(bank, None, SamplingSection(max_new_tokens=8), (EOS,))(prompts, 5)
        other = PolicySampler(bank, None, SamplingSection(max_new_tokens=8), (EOS,))(prompts, 6)
        assert torch.equal(one.ids, two.ids)
        assert not torch.equal(one.ids, other.ids)

    def test_min_and_max_tokens(self, bank: AdapterBank, prompts: Prompts) -> None:
        stops = [EOS, *range(4, 200)]
        short = PolicySampler(bank, None, SamplingSection(max_new_tokens=1), tuple(stops))(prompts.repeat(5), 0)
        assert short.ids.shape[1] == 1
        long = PolicySampler(bank, None, SamplingSection(max_new_tokens=6, min_new_tokens=4), tuple(stops))(
            prompts.repeat(5), 0
        )
        assert int(long.lengths.min()) >= 4

    def test_texts_are_those_of_the_counted_tokens(self, bank: AdapterBank, prompts: Prompts) -> None:
        rollout = PolicySampler(bank, None, SamplingSection(max_new_tokens=8), (EOS,))(prompts, 3)
        for text, row, keep in zip(rollout.texts, rollout.ids, rollout.mask, strict=True):
            assert text == bank.tokenizer.decode(row[keep].tolist(), skip_special_tokens=True)

    def test_the_bank_is_left_as_it_was(self, prompts: Prompts) -> None:
        bank = tiny_bank()
        bank.add("policy", make_config(4, 8, "all-linear", 0.0, {}, bank.linears), seed=0)
        PolicySampler(bank, "policy", SamplingSection(max_new_tokens=4), (EOS,))(prompts, 3)
        assert bank.active is None
        assert not bank.base.training
        assert all(parameter.requires_grad for parameter in bank.parameters("policy").values())


def first_token_frequencies(
    bank: AdapterBank, sampling: SamplingSection, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled frequencies of the first token, and the probabilities that scoring gives the same tokens."""
    prompts = Prompts.of([bank.tokenizer("A good").input_ids] * count, 0)
    rollout = PolicySampler(bank, None, sampling, (EOS,))(prompts, 11)
    frequencies = torch.bincount(rollout.ids[:, 0], minlength=260) / count
    first = rollout.select(slice(0, 260))
    each = type(first)(
        first.prompts, torch.arange(260)[:, None], torch.ones(260, 1, dtype=torch.bool), first.texts, first.finished
    )
    return frequencies, view_output(bank, View(None), each, sampling.temperature, PassLimits(260)).logprobs[:, 0].exp()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_what_is_sampled_is_what_is_scored(bank: AdapterBank, temperature: float) -> None:
    count = 4000
    sampling = SamplingSection(max_new_tokens=1, temperature=temperature)
    frequencies, probabilities = first_token_frequencies(bank, sampling, count)
    assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-5)
    likely = probabilities > 0.01
    spread = (probabilities * (1 - probabilities) / count).sqrt()
    assert (
        float(((frequencies - probabilities).abs() / spread)[likely].max()) < 4.5
    )  # standard errors, over about 50 tokens
    # A distribution of another temperature is told apart by the same test.
    assert float((frequencies - probabilities).abs().sum()) < 0.35


@pytest.mark.parametrize(
    "habit", [{"repetition_penalty": 50.0}, {"top_k": 1, "do_sample": False}, {"top_p": 0.01}, {"min_p": 0.9}]
)
def test_a_models_own_sampling_habits_are_ignored(bank: AdapterBank, habit: dict[str, Any], prompts: Prompts) -> None:
    """A model folder may bring a generation_config.json; sampling from it would not be what is scored."""
    expected = PolicySampler(bank, None, SamplingSection(max_new_tokens=12), (EOS,))(prompts.repeat(4), 2)
    stubborn = tiny_bank()
    for name, value in habit.items():
        setattr(stubborn.base.generation_config, name, value)
    found = PolicySampler(stubborn, None, SamplingSection(max_new_tokens=12), (EOS,))(prompts.repeat(4), 2)
    assert torch.equal(found.ids, expected.ids)
    for name, value in habit.items():  # and they are still there for those who save the model
        assert getattr(stubborn.base.generation_config, name) == value
