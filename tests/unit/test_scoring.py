"""Scoring: padding changes nothing, log-probs are the model's own, and what reward functions may give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy
import pandas
import pytest
import torch
from torch import Tensor

from marl_core import AdapterBank, ConfigError, NumericError, PluginError, Prompts, Rollout, ScoreView, View
from marl_core.ppo.budget import PassLimits
from marl_core.ppo.rewards import as_scores, score_all
from marl_core.ppo.roles import RewardSource
from marl_core.ppo.scoring import reference_logprobs, view_output, view_values
from marl_core.testing import fake_rollout, tiny_bank, tiny_tokenizer
from marl_core.testing.kinds import make_config

PAIRS = [("A good", " film."), ("Bad", " acting, worse plot"), ("It", ""), ("What a surprise this was", "!")]


@pytest.fixture(scope="module")
def bank() -> AdapterBank:
    """A policy with nonzero weights, a value head with nonzero weights, and a reward head."""
    bank = tiny_bank()
    bank.add("policy", make_config(4, 8, "all-linear", 0.0, {}, bank.linears), seed=0)
    random = torch.Generator().manual_seed(0)
    bank.add_value_head("value-head")
    bank.heads["score"] = torch.nn.Linear(32, 1)
    with torch.no_grad():
        for name in ("policy", "value-head", "score"):
            for parameter in bank.parameters(name).values():
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
    return bank


def padded(rollout: Rollout, left: int, right: int) -> Rollout:
    """The same responses with more padding on both sides."""
    p = rollout.prompts
    ids = torch.nn.functional.pad(p.ids, (left, 0), value=77)
    prompts = Prompts(ids, torch.nn.functional.pad(p.mask, (left, 0)), p.rows, p.texts)
    response = torch.nn.functional.pad(rollout.ids, (0, right), value=77)
    return Rollout(
        prompts, response, torch.nn.functional.pad(rollout.mask, (0, right)), rollout.texts, rollout.finished
    )


def numbers(bank: AdapterBank, rollout: Rollout, size: int = 8) -> list[Tensor]:
    """Log-probs, entropy and values at the tokens that count, and rewards: everything scoring gives."""
    passed = view_output(bank, View("policy"), rollout, 0.8, PassLimits(size), value_head="value-head", entropy=True)
    values = view_values(bank, "policy", "value-head", rollout, PassLimits(size))
    assert passed.values is not None
    scores = bank.score(ScoreView(View("policy"), "score"), rollout.sequence_ids, rollout.sequence_mask)
    mask = rollout.mask
    return [passed.logprobs[mask], passed.entropy[mask], passed.values[mask], values[mask], scores]


class TestPadding:
    """fp32 on the tiny model: within 2e-6 of the number's own size."""

    @pytest.mark.parametrize(("left", "right"), [(5, 0), (0, 5), (3, 4)])
    def test_more_padding(self, bank: AdapterBank, left: int, right: int) -> None:
        rollout = fake_rollout(PAIRS)
        for found, expected in zip(numbers(bank, padded(rollout, left, right)), numbers(bank, rollout), strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)

    def test_alone_and_in_a_batch(self, bank: AdapterBank) -> None:
        together = numbers(bank, fake_rollout([*PAIRS, ("x", "y")]))
        alone = [numbers(bank, fake_rollout([pair, ("x", "y")]).select(slice(0, 1))) for pair in PAIRS]
        last = numbers(bank, fake_rollout([*PAIRS, ("x", "y")]).select(slice(4, 5)))
        for kind, whole in enumerate(together):
            torch.testing.assert_close(whole, torch.cat([row[kind] for row in [*alone, last]]), rtol=2e-6, atol=2e-6)

    @pytest.mark.parametrize("size", [1, 3])
    def test_microbatches(self, bank: AdapterBank, size: int) -> None:
        rollout = fake_rollout(PAIRS)
        for found, expected in zip(numbers(bank, rollout, size), numbers(bank, rollout), strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)

    def test_ids_under_the_mask_change_nothing_bitwise(self, bank: AdapterBank) -> None:
        rollout = fake_rollout(PAIRS)
        ids, prompt_ids = rollout.ids.clone(), rollout.prompts.ids.clone()
        ids[~rollout.mask], prompt_ids[~rollout.prompts.mask] = 200, 201
        prompts = Prompts(prompt_ids, rollout.prompts.mask, rollout.prompts.rows)
        garbage = Rollout(prompts, ids, rollout.mask, rollout.texts, rollout.finished)
        for found, expected in zip(numbers(bank, garbage), numbers(bank, rollout), strict=True):
            assert torch.equal(found, expected)

    def test_nothing_is_written_under_the_mask(self, bank: AdapterBank) -> None:
        rollout = padded(fake_rollout(PAIRS), 0, 3)
        passed = view_output(bank, View("policy"), rollout, 1.0, PassLimits(2), value_head="value-head", entropy=True)
        values = view_values(bank, "policy", "value-head", rollout, PassLimits(2))
        for tensor in (passed.logprobs, passed.entropy, passed.values, values):
            assert tensor is not None
            assert torch.count_nonzero(tensor[~rollout.mask]) == 0


class TestLogprobs:
    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    def test_equal_the_models_own_logits(self, bank: AdapterBank, temperature: float) -> None:
        rollout = fake_rollout(PAIRS)
        passed = view_output(bank, View("policy"), rollout, temperature, PassLimits(8), entropy=True)
        for row in range(len(rollout)):  # one by one, without any padding
            prompt = rollout.prompts.ids[row][rollout.prompts.mask[row]]
            response = rollout.ids[row][rollout.mask[row]]
            with bank.using("policy") as model, torch.no_grad():
                logits = model(torch.cat([prompt, response])[None]).logits[0].double()
            logp = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
            expected = logp.gather(1, response[:, None]).squeeze(1)
            torch.testing.assert_close(passed.logprobs[row][rollout.mask[row]].double(), expected, rtol=0, atol=5e-6)
            entropy = -(logp.exp() * logp).sum(-1)
            torch.testing.assert_close(passed.entropy[row][rollout.mask[row]].double(), entropy, rtol=0, atol=5e-6)

    def test_a_head_that_is_more_than_one_matrix(self) -> None:
        """Granite scales its logits: then the model's own logits are used."""
        from transformers import GraniteConfig, GraniteForCausalLM

        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
        torch.manual_seed(0)
        model = GraniteForCausalLM(
            GraniteConfig(vocab_size=260, logits_scaling=4.0, initializer_range=0.3, **sizes)
        ).eval()
        scaled = AdapterBank(model, tiny_tokenizer())
        assert not scaled.trunk.plain_head
        rollout = fake_rollout(PAIRS[:1])
        found = view_output(scaled, View(None), rollout, 1.0, PassLimits(8), entropy=True)
        logp = model(rollout.sequence_ids).logits[0, rollout.prompts.ids.shape[1] - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(
            found.logprobs[0], logp.gather(1, rollout.ids[0][:, None]).squeeze(1), rtol=0, atol=5e-6
        )
        torch.testing.assert_close(found.entropy[0], -(logp.exp() * logp).sum(-1), rtol=0, atol=5e-6)

    def test_learned_positions_are_not_shifted_by_padding(self) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
        gpt = AdapterBank(
            GPT2LMHeadModel(GPT2Config(vocab_size=260, bos_token_id=1, eos_token_id=2, **sizes)).eval(),
            tiny_tokenizer(),
        )
        rollout = fake_rollout(PAIRS)
        one = view_output(gpt, View(None), rollout, 1.0, PassLimits(8)).logprobs[rollout.mask]
        two = view_output(gpt, View(None), padded(rollout, 6, 0), 1.0, PassLimits(8)).logprobs[rollout.mask]
        torch.testing.assert_close(one, two, rtol=0, atol=5e-6)

    def test_no_graph_is_kept(self, bank: AdapterBank) -> None:
        assert not view_output(bank, View("policy"), fake_rollout(), 1.0, PassLimits(2)).logprobs.requires_grad


class TestReference:
    def test_a_view(self, bank: AdapterBank) -> None:
        rollout = fake_rollout()
        found = reference_logprobs(bank, View(None), rollout, 1.0, PassLimits(2))
        assert torch.equal(found, view_output(bank, View(None), rollout, 1.0, PassLimits(2)).logprobs)
        assert not torch.equal(found, view_output(bank, View("policy"), rollout, 1.0, PassLimits(2)).logprobs)

    def test_a_functions_answer_is_detached_and_masked(self, bank: AdapterBank) -> None:
        rollout = fake_rollout()
        given = torch.full(rollout.ids.shape, -1.5, dtype=torch.float64, requires_grad=True)
        found = reference_logprobs(bank, lambda _: given, rollout, 1.0, PassLimits(2))
        assert found.dtype == torch.float32
        assert not found.requires_grad
        assert torch.equal(found, torch.where(rollout.mask, -1.5, 0.0))

    @pytest.mark.parametrize("wrong", [None, [[-1.0]], torch.zeros(3), torch.zeros(3, 99)])
    def test_another_shape_is_the_plugins_fault(self, bank: AdapterBank, wrong: Any) -> None:
        with pytest.raises(PluginError, match=r"acme: the reference must give log-probs of shape \[3, \d+\]"):
            reference_logprobs(bank, lambda _: wrong, fake_rollout(), 1.0, PassLimits(2), "acme")

    def test_what_it_raises_is_the_plugins_fault(self, bank: AdapterBank) -> None:
        with pytest.raises(PluginError, match="acme failed on a batch of 3: KeyError"):
            reference_logprobs(
                bank, lambda rollout: rollout.prompts.rows[0]["x"], fake_rollout(), 1.0, PassLimits(2), "acme"
            )

    def test_a_column_that_the_data_have_not_is_told_those_they_have(self, bank: AdapterBank) -> None:
        rollout = fake_rollout([("A", " film")] * 2, [{"prompt": "A", "wanted": "b"}, {"prompt": "A", "other": 1}])

        empty: dict[str, Any] = {}

        def asks(key: str) -> str:
            with pytest.raises(PluginError) as caught:
                reference_logprobs(bank, lambda _: empty[key], rollout, 1.0, PassLimits(2), "acme")
            return str(caught.value)

        columns = "The data's columns (rollout.prompts.rows) are: prompt, wanted, other"
        assert f"{columns}. Did you mean 'wanted'?" in asks("wantd")
        assert columns not in asks("wanted")  # it is there: another dictionary lacks it
        assert "Did you mean" not in asks("zzz")

    def test_an_error_of_marl_inside_of_it_names_it(self, bank: AdapterBank) -> None:
        def looks(rollout: Rollout) -> Any:
            return bank.tensors("polcy")

        with pytest.raises(ConfigError) as caught:
            reference_logprobs(bank, looks, fake_rollout(), 1.0, PassLimits(2), "copies of acme 1.0")
        assert "(In copies of acme 1.0. It was raised from " in str(caught.value)
        assert 'in looks: `return bank.tensors("polcy")`.)' in str(caught.value)


def source(result: Any, name: str = "judge", weight: float = 1.0) -> RewardSource:
    def score(rollout: Rollout) -> Any:
        if isinstance(result, BaseException):
            raise result
        return result

    return RewardSource(name, weight, score, "judge of acme 1.0")


def total(bank: AdapterBank, *sources: RewardSource) -> Tensor:
    return score_all(bank, sources, fake_rollout(), PassLimits(2)).total


class TestRewards:
    """fake_rollout has three responses."""

    @pytest.mark.parametrize(
        "good",
        [
            [1, 2.5, -3.0],
            (1, 2.5, -3.0),
            torch.tensor([1.0, 2.5, -3.0]),
            torch.tensor([1.0, 2.5, -3.0], dtype=torch.float64),
            torch.tensor([1.0, 2.5, -3.0], requires_grad=True),
            torch.tensor([1.0, 2.5, -3.0], dtype=torch.bfloat16),
            [Fraction(1), torch.tensor([2.5]).numpy()[0], -3.0],
            [Decimal(1), torch.tensor(2.5), numpy.float16(-3)],
            torch.tensor([[1.0], [2.5], [-3.0]]),
            numpy.array([1, 2.5, -3.0]),
            numpy.array([[1.0], [2.5], [-3.0]], dtype=numpy.float32),
            pandas.Series([1, 2.5, -3.0], index=[7, 8, 9]),
        ],
    )
    def test_lossless_numbers_are_taken(self, bank: AdapterBank, good: Any) -> None:
        found = total(bank, source(good))
        assert found.tolist() == [1.0, 2.5, -3.0]
        assert found.dtype == torch.float32
        assert not found.requires_grad

    @pytest.mark.parametrize(
        "good",
        [
            [True, False, True],
            (True, 0, 1.0),
            torch.tensor([True, False, True]),
            [torch.tensor(True), torch.tensor(0), torch.tensor([1.0])[0]],
            numpy.array([True, False, True]),
            [numpy.bool_(True), numpy.int8(0), numpy.uint64(1)],
        ],
    )
    def test_right_or_wrong_is_a_number_too(self, bank: AdapterBank, good: Any) -> None:
        assert total(bank, source(good)).tolist() == [1.0, 0.0, 1.0]

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ([1.0, 2.0], "gave 2 rewards for 3 responses"),
            ([1.0] * 4, "gave 4 rewards for 3 responses"),
            (torch.zeros(3, 2), "response 1 has 7 tokens and got 2 numbers"),
            (torch.zeros(3, device="meta"), "without data"),
            (torch.tensor(1.0), "gave 1 rewards for 3 responses"),
            (1.0, "gave a float; return a list of 3 numbers"),
            (None, "returned None"),
            ("abc", "gave a str"),
            ({"a": 1.0}, "gave a dict"),
            (iter([1.0]), "gave a list_iterator"),
            ([1.0, float("nan"), 2.0], "response 2 got nan, not a finite number"),
            ([1.0, 2.0, float("inf")], "response 3 got inf"),
            (torch.tensor([1.0, float("nan"), 2.0]), "response 2 got nan"),
            ([1.0, "2", 3.0], "response 2 got '2'"),
            ([[1.0], 1.0, 2.0], "response 1 has 7 tokens and got 1 numbers; give one for each token"),
            ([1j, 1.0, 2.0], "response 1 got 1j"),
            ([1e300, 1.0, 2.0], "response 1 got 1e\\+300"),
            ([10**400, 1.0, 2.0], "response 1 got 1000"),
        ],
    )
    def test_anything_else_is_the_plugins_fault(self, bank: AdapterBank, bad: Any, message: str) -> None:
        with pytest.raises(PluginError, match=message) as caught:
            total(bank, source(bad))
        assert "reward 'judge' (judge of acme 1.0)" in str(caught.value)

    def test_the_text_of_a_bad_row_is_shown(self, bank: AdapterBank) -> None:
        with pytest.raises(PluginError, match="its text begins ' acting'"):
            total(bank, source([0.0, float("nan"), 0.0]))

    @pytest.mark.parametrize("error", [KeyError("x"), ZeroDivisionError("by zero"), ValueError("bad")])
    def test_what_it_raises_is_chained_and_named(self, bank: AdapterBank, error: Exception) -> None:
        with pytest.raises(
            PluginError, match=f"reward 'judge' .* failed on a batch of 3: {type(error).__name__}"
        ) as caught:
            total(bank, source(error))
        assert caught.value.__cause__ is error

    def test_ctrl_c_passes(self, bank: AdapterBank) -> None:
        with pytest.raises(KeyboardInterrupt):
            total(bank, source(KeyboardInterrupt()))

    def test_weighted_sum_and_parts(self, bank: AdapterBank) -> None:
        sources = [source([1.0, 2.0, 3.0], "a", 0.5), source([10.0, 0.0, -10.0], "b", -1.0)]
        found = score_all(bank, sources, fake_rollout(), PassLimits(2))
        assert found.total.tolist() == [0.5 - 10, 1.0, 1.5 + 10]
        assert {name: part.tolist() for name, part in found.parts.items()} == {
            "a": [1.0, 2.0, 3.0],
            "b": [10.0, 0.0, -10.0],
        }

    def test_none_abstains_where_another_source_judges(self, bank: AdapterBank) -> None:
        sources = [source([1.0, None, 3.0], "a"), source([None, 2.0, 1.0], "b", 2.0)]
        found = score_all(bank, sources, fake_rollout(), PassLimits(2))
        assert found.total.tolist() == [1.0, 4.0, 5.0]
        assert found.parts["a"].isnan().tolist() == [False, True, False]

    def test_somebody_must_judge_each_response(self, bank: AdapterBank) -> None:
        with pytest.raises(PluginError, match=r"no source \(a, b\) gave response 2 a score; its text begins ' acting'"):
            total(bank, source([1.0, None, 3.0], "a"), source([None, None, 3.0], "b"))

    def test_a_shared_view_is_scored_in_pieces(self, bank: AdapterBank) -> None:
        view, rollout = ScoreView(View("policy"), "score"), fake_rollout()
        found = score_all(bank, [RewardSource("r", 2.0, view)], rollout, PassLimits(1)).total
        torch.testing.assert_close(found, 2 * bank.score(view, rollout.sequence_ids, rollout.sequence_mask))

    def test_a_shared_view_with_bad_weights_is_a_numeric_error(self, bank: AdapterBank) -> None:
        bank.heads["broken"] = torch.nn.Linear(32, 1)
        torch.nn.init.constant_(bank.heads["broken"].bias, float("nan"))
        with pytest.raises(NumericError, match="reward 'r': response 1 got nan"):
            score_all(bank, [RewardSource("r", 1.0, ScoreView(View(None), "broken"))], fake_rollout(), PassLimits(2))

    def test_a_single_response(self) -> None:
        one = fake_rollout([("a", "b")])
        assert as_scores([2], one, "who").tolist() == [2.0]
        with pytest.raises(PluginError):
            as_scores(torch.zeros(1, 2), one, "who")

    def test_functions_run_without_grad(self, bank: AdapterBank) -> None:
        seen: list[bool] = []

        def score(rollout: Rollout) -> Sequence[float]:
            seen.append(torch.is_grad_enabled())
            return [0.0] * len(rollout)

        function: Callable[[Rollout], Sequence[float]] = score
        score_all(bank, [RewardSource("r", 1.0, function)], fake_rollout(), PassLimits(2))
        assert seen == [False]
