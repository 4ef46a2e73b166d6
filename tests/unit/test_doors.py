"""What a tokenizer, TRL, numpy, pandas or torch gives, every public call takes; the right value is transformers' and peft's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from marl_core import (
    AdapterBank,
    ConfigError,
    DataError,
    Prompts,
    Rollout,
    Runner,
    response_logprobs,
    write_certificate,
)
from marl_core.bank.inputs import as_ids, as_mask
from marl_core.ppo.types import Advantages, ScoredRollout
from marl_core.testing import tiny_tokenizer

MakeConfig = Callable[..., Any]
TEXTS = ["hello there", "hi", "what a film"]
NOISE = 1e-5
"""Room for float32 rounding between the shared base and transformers' classifier: other shapes, other kernels."""


@pytest.fixture(scope="module")
def bank(tiny_folder: str, reward_adapter: str) -> AdapterBank:
    made = AdapterBank.from_pretrained(tiny_folder, device="cpu")
    made.load_reward(reward_adapter)
    return made


@pytest.fixture(scope="module")
def wanted(tiny_folder: str, reward_adapter: str, bank: AdapterBank) -> Tensor:
    """Each text's score, alone and without padding, by transformers and peft."""
    base = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1)
    base.config.pad_token_id = 0
    judge = PeftModel.from_pretrained(base, reward_adapter).eval()
    with torch.no_grad():
        rows = [judge(input_ids=torch.tensor([bank.tokenizer(text).input_ids])).logits[0, 0] for text in TEXTS]
    return torch.stack(rows)


def tokens(bank: AdapterBank, side: str = "left", kind: str | None = "pt") -> Any:
    return bank.tokenizer(TEXTS, padding=True, padding_side=side, return_tensors=kind)


MASKS = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64)


class TestTheClassicCall:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("dtype", MASKS, ids=str)
    def test_masks_of_any_dtype(self, bank: AdapterBank, wanted: Tensor, dtype: torch.dtype, side: str) -> None:
        given = tokens(bank, side)
        found = bank.compute_reward_score(given.input_ids, given.attention_mask.to(dtype))
        torch.testing.assert_close(found, wanted, rtol=0, atol=NOISE)

    @pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.float32], ids=str)
    def test_ids_of_any_dtype(self, bank: AdapterBank, wanted: Tensor, dtype: torch.dtype) -> None:
        given = tokens(bank)
        found = bank.compute_reward_score(given.input_ids.to(dtype), given.attention_mask)
        torch.testing.assert_close(found, wanted, rtol=0, atol=NOISE)

    @pytest.mark.parametrize("kind", ["pt", "np", None])
    def test_all_that_a_tokenizer_returns(self, bank: AdapterBank, wanted: Tensor, kind: str | None) -> None:
        """Tensors, arrays and plain lists; token types beside them."""
        given = tokens(bank, kind=kind)
        assert {"input_ids", "attention_mask"} <= set(given)
        torch.testing.assert_close(bank.compute_reward_score(**given), wanted, rtol=0, atol=NOISE)
        types = dict.fromkeys(("token_type_ids", "special_tokens_mask", "length"), given["attention_mask"])
        torch.testing.assert_close(bank.compute_reward_score(**{**given, **types}), wanted, rtol=0, atol=NOISE)

    def test_lists_of_single_tensors(self, bank: AdapterBank, wanted: Tensor) -> None:
        given = tokens(bank)
        ids, mask = [list(row) for row in given.input_ids], [list(row) for row in given.attention_mask]
        view = next(iter(bank.reward_views.values()))
        torch.testing.assert_close(bank.score(view, ids, mask), wanted, rtol=0, atol=NOISE)  # type: ignore[arg-type]

    @pytest.mark.parametrize("garbage", [-100, -1, 10**6])
    def test_whatever_stands_under_the_mask(self, bank: AdapterBank, wanted: Tensor, garbage: int) -> None:
        given = tokens(bank)
        ids = given.input_ids.masked_fill(given.attention_mask == 0, garbage)
        found = bank.compute_reward_score(ids, given.attention_mask)
        torch.testing.assert_close(found, wanted, rtol=0, atol=NOISE)

    def test_without_a_mask_every_token_counts(self, bank: AdapterBank, wanted: Tensor) -> None:
        ids = torch.tensor([bank.tokenizer(TEXTS[0]).input_ids])
        torch.testing.assert_close(bank.compute_reward_score(ids), wanted[:1], rtol=0, atol=NOISE)

    @pytest.mark.parametrize(
        ("ids", "mask", "message"),
        [
            ([[5, 6]], [[0.5, 1.0]], "attention_mask: expected a mask of 0 and 1.*it holds 0.5"),
            ([[5, 6]], [[2, 1]], "attention_mask: expected a mask of 0 and 1.*it holds 2"),
            ([[5, 6]], [[float("nan"), 1.0]], "it holds nan"),
            ([[5, 6]], [[1, 1, 1]], r"attention_mask: expected a mask of 0 and 1 of shape \[1, 2\], got \[1, 3\]"),
            ([[5, 6]], [[0, 0]], "each row needs a token that counts; rows without one: 1"),
            ([5, 6], None, r"input_ids: expected token ids of shape \[rows, tokens\], got \[2\]"),
            ([[5, 6.5]], None, "input_ids: expected token ids.*no whole numbers"),
            ([[5], [5, 6]], None, "input_ids: expected a tensor, an array or nested lists.*rows of equal length"),
            ([["5", "6"]], None, "input_ids: expected a tensor"),
            ("hello", None, "input_ids: expected numbers, got a str"),
            ([[5, 260]], None, "row 1 holds token 260 at place 2, and this model has 260 tokens"),
            ([[5, -3]], None, "row 1 holds token -3"),
            (torch.zeros(1, 2, device="meta"), None, "without data"),
        ],
    )
    def test_what_cant_be_meant(self, bank: AdapterBank, ids: Any, mask: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            bank.compute_reward_score(ids, mask)

    def test_a_table_of_pandas(self, bank: AdapterBank, wanted: Tensor) -> None:
        given = tokens(bank, kind="np")
        found = bank.compute_reward_score(
            pandas.DataFrame(given["input_ids"]), pandas.DataFrame(given["attention_mask"])
        )
        torch.testing.assert_close(found, wanted, rtol=0, atol=NOISE)

    def test_by_the_adapters_name(self, bank: AdapterBank, wanted: Tensor) -> None:
        found = bank.compute_reward_score(**tokens(bank), reward="reward")
        torch.testing.assert_close(found, wanted, rtol=0, atol=NOISE)
        with pytest.raises(ConfigError, match="no reward adapter 'nope'; it has: reward"):
            bank.compute_reward_score(**tokens(bank), reward="nope")

    def test_a_reading_that_is_none(self, bank: AdapterBank, reward_adapter: str) -> None:
        position: Any = "first"
        with pytest.raises(ConfigError, match="position: 'first' is none of last-attended, last-non-pad"):
            bank.load_reward(reward_adapter, position=position)

    def test_the_head_is_float32_under_autocast(self, bank: AdapterBank) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert bank.compute_reward_score(**tokens(bank)).dtype == torch.float32

    def test_a_table_of_positions_ends(self) -> None:
        body = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_positions=16, n_embd=32, n_layer=1, n_head=4))
        bank = AdapterBank(body.eval(), tiny_tokenizer())
        rollout = Rollout.from_responses(Prompts.of([[5] * 10], None), [[6] * 6], bank.tokenizer)
        assert response_logprobs(bank, rollout).shape == (1, 6)
        longer = Rollout.from_responses(Prompts.of([[5] * 10], None), [[6] * 7], bank.tokenizer)
        with pytest.raises(DataError, match="row 1 has 17 tokens, and this model has positions for 16"):
            response_logprobs(bank, longer)


class TestResponses:
    prompts = Prompts.of([[5], [5]], 0)

    @pytest.mark.parametrize(
        ("responses", "stops", "message"),
        [
            ([[6, 7], [8, -100]], None, "row 2 holds -100"),
            ([[6]], None, "1 responses for 2 prompts"),
            ([[6], [7]], "<eos>", "stop_ids: expected tokens' numbers, got '<eos>'"),
        ],
    )
    def test_what_cant_be_meant(self, bank: AdapterBank, responses: Any, stops: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            Rollout.from_responses(self.prompts, responses, bank.tokenizer, stops)

    def test_tokens_of_another_vocabulary(self, bank: AdapterBank, make_config: MakeConfig) -> None:
        rollout = Rollout.from_responses(self.prompts, [[6], [999]], bank.tokenizer)
        for call in (lambda: response_logprobs(bank, rollout), lambda: Runner(make_config()).score(rollout, [1, 2])):
            with pytest.raises(DataError, match="row 2 holds token 999 at place 2, and this model has 260 tokens"):
                call()

    @pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": float("nan")}, {"batch": 0}], ids=str)
    def test_options(self, bank: AdapterBank, options: Any) -> None:
        with pytest.raises(ConfigError, match=f"{next(iter(options))}: expected"):
            response_logprobs(bank, Rollout.from_responses(self.prompts, [[6], [7]], bank.tokenizer), **options)


ROWS = [[5, 6, 7], [8], [9, 10]]


@pytest.mark.parametrize(
    "given",
    [
        ROWS,
        tuple(tuple(row) for row in ROWS),
        [torch.tensor(row) for row in ROWS],
        [torch.tensor(row, dtype=torch.int32) for row in ROWS],
        [list(torch.tensor(row)) for row in ROWS],
        [numpy.array(row, dtype=numpy.uint16) for row in ROWS],
        [[numpy.int64(token) for token in row] for row in ROWS],
        pandas.Series(ROWS),
        numpy.array([numpy.array(row) for row in ROWS], dtype=object),
        pyarrow.array(ROWS),
        pyarrow.chunked_array([ROWS[:1], ROWS[1:]]),
        torch.nested.nested_tensor([torch.tensor(row) for row in ROWS], layout=torch.jagged),
    ],
    ids=lambda given: type(given).__name__,
)
class TestTokenLists:
    def test_of_prompts(self, given: Any) -> None:
        prompts = Prompts.of(given, 0)
        assert prompts.ids.tolist() == [[5, 6, 7], [0, 0, 8], [0, 9, 10]]
        assert prompts.mask.tolist() == [[True] * 3, [False, False, True], [False, True, True]]

    def test_of_responses(self, given: Any, bank: AdapterBank) -> None:
        rollout = Rollout.from_responses(Prompts.of([[5], [5], [5]], 0), given, bank.tokenizer)
        assert rollout.ids.tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0]]
        assert rollout.lengths.tolist() == [3, 1, 2]


class TestPrompts:
    def test_padded_by_a_tokenizer(self, bank: AdapterBank) -> None:
        rows = [bank.tokenizer(text).input_ids for text in TEXTS]
        for kind in ("pt", "np", None):
            for side in ("left", "right"):
                given = tokens(bank, side, kind)
                prompts = Prompts.of(given["input_ids"], 0, mask=given["attention_mask"])
                assert [row[keep].tolist() for row, keep in zip(prompts.ids, prompts.mask, strict=True)] == rows
                if side == "left":
                    same = Prompts(given["input_ids"], given["attention_mask"], [{}] * 3)
                    assert torch.equal(same.mask, prompts.mask)

    def test_without_a_pad_token(self) -> None:
        """GPT-2's and Llama's tokenizers have none, and what stands under a false mask is never read."""
        prompts = Prompts.of([[5, 6], [7]], None)
        assert prompts.mask.tolist() == [[True, True], [False, True]]

    def test_texts_of_an_arrow_column(self) -> None:
        for texts in (pyarrow.array(["a", "b"]), pyarrow.chunked_array([["a"], ["b"]])):
            assert [type(text) for text in Prompts.of([[1], [2]], 0, texts=texts).texts] == [str, str]

    def test_columns_out_of_parquet(self, tmp_path: Path) -> None:
        table = pandas.DataFrame({"label": [1, 2, 3], "ids": ROWS, "name": ["a", "b", "c"]})
        pyarrow.parquet.write_table(pyarrow.Table.from_pandas(table), tmp_path / "x.parquet")
        read = pyarrow.parquet.read_table(tmp_path / "x.parquet")
        frame = read.to_pandas()
        for rows in (read, frame, read.to_pylist(), read.to_pydict(), {"label": frame["label"]}):
            prompts = Prompts.of(frame["ids"], 0, rows, frame["name"])
            assert [row["label"] for row in prompts.rows] == [1, 2, 3]
            assert prompts.ids.tolist() == [[5, 6, 7], [0, 0, 8], [0, 9, 10]]
            assert list(prompts.texts) == ["a", "b", "c"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([[1], "ab"], 0), "row 2 must be a list of token ids, it is 'ab'"),
            (([[1], [2, "3"]], 0), r"row 2 must be a list of token ids, it is \[2, '3'\]"),
            (([[1], [2, 0.5]], 0), r"row 2 must be a list of token ids, it is \[2, 0.5\]"),
            (([1, 2], 0), "row 1 must be a list of token ids, it is 1"),
            (([[1], [2]], 0, {"label": [1]}), r"an entry for each of 2 prompts; lengths: \{'label': 1\}"),
            (([[1], [2]], 0, None, "ab"), "a text for each row, not one text"),
            (([[1], [2]], 0, None, 5), "a text for each row, not 5"),
            (([[1], [2]], 0, 5), "rows or columns by name, got a int"),
            (([[1], [2]], "0"), "pad: expected a token's number, or None"),
            (([[1], [2, -100]], 0), "row 2 holds -100, which is no token"),
            (([[1], [2**70]], 0), f"row 2 holds {2**70}, which is no token"),
        ],
    )
    def test_what_cant_be_meant(self, arguments: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            Prompts.of(*arguments)


class TestRollouts:
    @pytest.mark.parametrize("dtype", MASKS, ids=str)
    def test_log_probs_are_transformers_own(self, tiny_folder: str, bank: AdapterBank, dtype: torch.dtype) -> None:
        """A rollout put together by hand, with masks of any dtype."""
        prompts = Prompts.of(ROWS, 0)
        ids = torch.tensor([[11, 12, 13], [14, 15, 0], [16, 0, 0]], dtype=torch.int32)
        mask = (ids > 0).to(dtype)
        made = Rollout(prompts, ids, mask, ["", "", ""], torch.tensor([1, 0, 1]).to(dtype))
        found = response_logprobs(bank, made)
        judge = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
        for row, (prompt, response) in enumerate(zip(ROWS, [[11, 12, 13], [14, 15], [16]], strict=True)):
            with torch.no_grad():
                logits = judge(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            right = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
            torch.testing.assert_close(found[row, : len(response)], right, rtol=0, atol=NOISE)
        assert made.finished.tolist() == [True, False, True]

    @pytest.mark.parametrize(
        "stops",
        [11, [11], (11,), torch.tensor(11), torch.tensor([11]), numpy.array([11]), {11, None}],
        ids=lambda stops: type(stops).__name__,
    )
    def test_stop_ids(self, bank: AdapterBank, stops: Any) -> None:
        rollout = Rollout.from_responses(Prompts.of([[5]], 0), [[10, 11, 12]], bank.tokenizer, stops)
        assert rollout.ids.tolist() == [[10, 11]]

    @pytest.mark.parametrize(
        "scores",
        [
            [True, False, 1, 0.0],
            [torch.tensor(1.0), torch.tensor(False), numpy.float32(1), numpy.bool_(False)],
            torch.tensor([1, 0, 1, 0]),
            torch.tensor([[True], [False], [True], [False]]),
            numpy.array([1, 0, 1, 0], dtype=numpy.int8),
            pandas.Series([1.0, 0.0, 1.0, 0.0], index=[4, 5, 6, 7]),
        ],
        ids=lambda scores: type(scores).__name__,
    )
    def test_scores_of_ones_own(self, make_config: MakeConfig, scores: Any) -> None:
        runner = Runner(make_config())
        assert runner.data is not None
        scored = runner.score(runner.generate(runner.data.take([0, 1, 2, 3])), scores)
        assert scored.scores.tolist() == [1.0, 0.0, 1.0, 0.0]
        stats = runner.update(scored)
        assert stats.optimizer_steps > 0

    def test_numbers_of_a_scored_rollout(self, bank: AdapterBank) -> None:
        rollout = Rollout.from_responses(Prompts.of([[5], [6]], 0), [[10, 2], [11, 12]], bank.tokenizer)
        given = numpy.zeros((2, 2))
        scored = ScoredRollout(rollout, given, torch.zeros(2, 2, dtype=torch.bfloat16), None, [1, True])  # type: ignore[arg-type]
        assert scored.logprobs.dtype == torch.float32
        assert scored.scores.tolist() == [1.0, 1.0]

    @pytest.mark.parametrize(
        ("shape", "message"),
        [((4, 9), r"Advantages.kl: expected numbers of shape \[4, \d+\]"), ((4,), "Advantages.kl")],
    )
    def test_advantages_of_another_shape(self, make_config: MakeConfig, shape: tuple[int, ...], message: str) -> None:
        runner = Runner(make_config(value="none", ppo={"advantage": "rloo", "samples_per_prompt": 2}))
        assert runner.data is not None
        scored = runner.score(runner.generate(runner.data.take([0, 1])))
        wrong = torch.zeros(shape)
        with pytest.raises(DataError, match=message):
            runner.update(scored, Advantages(wrong, wrong, wrong, None))


class TestCertificates:
    @pytest.mark.parametrize("texts", [TEXTS, tuple(TEXTS), numpy.array(TEXTS), pandas.Series(TEXTS), iter(TEXTS)])
    def test_texts(self, tiny_folder: str, tmp_path: Path, write_reward_adapter: Any, texts: Any) -> None:
        folder = write_reward_adapter(tiny_folder, tmp_path / "rm")
        assert len(write_certificate(folder, tiny_folder, texts)["golden"]) == 3

    @pytest.mark.parametrize(
        ("texts", "message"), [("hello", "a list of texts, not one text"), ([1], "text 1 is a int")]
    )
    def test_what_cant_be_meant(self, tiny_folder: str, reward_adapter: str, texts: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            write_certificate(reward_adapter, tiny_folder, texts)


def test_one_form_comes_out_of_the_door() -> None:
    assert as_ids([[1, 2]], "x").dtype == torch.int64
    assert as_mask([[1, 0]], "x").dtype == torch.bool
    with pytest.raises(DataError, match="x: expected numbers, got a NoneType"):
        as_ids(None, "x")
