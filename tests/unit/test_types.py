"""The data of a step: shapes are checked where it is made, and selecting rows keeps everything together."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from marl_core import DataError, MarlDeprecationWarning, Prompts, Rollout, ScoredRollout
from marl_core.ppo.types import StepStats, UpdateStats, pad_rows
from marl_core.testing import fake_rollout, tiny_tokenizer


def test_pad_rows_on_both_sides() -> None:
    ids, mask = pad_rows([[5, 6], [7]], 9, "left")
    assert ids.tolist() == [[5, 6], [9, 7]]
    assert mask.tolist() == [[True, True], [False, True]]
    ids, mask = pad_rows([[5, 6], [7]], 9, "right")
    assert ids.tolist() == [[5, 6], [7, 9]]
    assert mask.tolist() == [[True, True], [True, False]]


def test_prompts_repeat_keeps_groups_together() -> None:
    prompts = Prompts.of([[1], [2, 3]], 0, [{"n": 1}, {"n": 2}], ["a", "b"]).repeat(2)
    assert prompts.ids.tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [row["n"] for row in prompts.rows] == [1, 1, 2, 2]
    assert list(prompts.texts) == ["a", "a", "b", "b"]


def test_prompts_refuse_what_cant_be_meant() -> None:
    ids, mask = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    Prompts(ids, mask, [{}, {}])
    for wrong, message in (
        ((ids, mask.float() / 2, [{}, {}]), r"Prompts.mask: expected a mask of 0 and 1, .*it holds 0.5"),
        ((ids, mask[:, :2], [{}, {}]), r"Prompts.mask: expected a mask of 0 and 1 of shape \[2, 3\], got \[2, 2\]"),
        ((ids, mask, [{}]), r"Prompts.ids: expected token ids of shape \[1, 3\]"),
        ((ids + 0.5, mask, [{}, {}]), r"Prompts.ids: expected token ids, .*no whole numbers"),
        ((ids, mask, [{}, {}], ["a"]), "1 texts for 2 prompts"),
        ((ids, mask, [{}, 3]), "row 2 is a int"),
    ):
        with pytest.raises(DataError, match=message):
            Prompts(*wrong)


def rollout_parts() -> dict[str, Any]:
    return {
        "prompts": Prompts.of([[1], [2]], 0),
        "ids": torch.zeros(2, 3, dtype=torch.int64),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "texts": ["", ""],
        "finished": torch.zeros(2, dtype=torch.bool),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mask", torch.ones(2, 4, dtype=torch.bool), "Rollout.mask"),
        ("ids", torch.zeros(3, 3, dtype=torch.int64), "Rollout.ids"),
        ("finished", torch.full((2,), 0.5), "Rollout.finished"),
        ("finished", torch.zeros(3), "Rollout.finished"),
        ("texts", [""], "1 texts for 2 prompts"),
        ("mask", torch.tensor([[True, True, True], [False, False, False]]), r"responses \[1\] have no token"),
    ],
)
def test_rollout_refuses(name: str, value: Any, message: str) -> None:
    Rollout(**rollout_parts())
    with pytest.raises(DataError, match=message):
        Rollout(**{**rollout_parts(), name: value})


def test_rollout_joins_prompt_and_response() -> None:
    rollout = fake_rollout()
    assert torch.equal(rollout.sequence_ids, torch.cat([rollout.prompts.ids, rollout.ids], dim=1))
    assert torch.equal(rollout.sequence_mask.sum(1), rollout.prompts.mask.sum(1) + rollout.lengths)


@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), slice(1, 3)])
def test_select_takes_whole_rows(rows: Any) -> None:
    words = tiny_tokenizer()
    data = [{"n": 0}, {"n": 1}, {"n": 2}]
    rollout = fake_rollout([("a", "x"), ("bc", "yz"), ("def", "w")], data, words)
    some = rollout.select(rows)
    for place, index in enumerate([2, 0] if isinstance(rows, torch.Tensor) else [1, 2]):
        assert some.texts[place] == rollout.texts[index]
        assert some.prompts.rows[place]["n"] == index
        assert some.prompts.texts[place] == rollout.prompts.texts[index]
        assert torch.equal(some.sequence_ids[place], rollout.sequence_ids[index])
        assert torch.equal(some.sequence_mask[place], rollout.sequence_mask[index])
        assert some.finished[place] == rollout.finished[index]


class TestFromResponses:
    words = tiny_tokenizer()

    def test_cut_after_the_first_stop_token(self) -> None:
        rollout = Rollout.from_responses(Prompts.of([[5], [5], [5]], 0), [[10, 2, 11, 2], [10, 11], [2]], self.words)
        assert rollout.ids.tolist() == [[10, 2], [10, 11], [2, 0]]
        assert rollout.mask.tolist() == [[True, True], [True, True], [True, False]]
        assert rollout.finished.tolist() == [True, False, True]

    def test_stop_tokens_of_ones_own(self) -> None:
        rollout = Rollout.from_responses(Prompts.of([[5]], 0), [[10, 2, 11, 12]], self.words, stop_ids=[11])
        assert rollout.ids.tolist() == [[10, 2, 11]]

    def test_texts_are_without_special_tokens(self) -> None:
        hello = self.words("hello").input_ids
        rollout = Rollout.from_responses(Prompts.of([[5]], 0), [[*hello, 2]], self.words)
        assert list(rollout.texts) == ["hello"]

    def test_where_pad_is_also_eos_the_stop_token_still_counts(self) -> None:
        words = tiny_tokenizer(pad_is_eos=True)
        rollout = Rollout.from_responses(Prompts.of([[5], [5]], words.pad_token_id), [[10, 2], [10, 11, 12]], words)
        assert rollout.mask.tolist() == [[True, True, False], [True, True, True]]

    def test_an_empty_response_is_refused(self) -> None:
        with pytest.raises(DataError, match=r"responses \[0\] have no token"):
            Rollout.from_responses(Prompts.of([[5]], 0), [[]], self.words)


def test_scored_rollout_checks_each_tensor() -> None:
    rollout = fake_rollout()
    good, scores = torch.zeros(rollout.ids.shape), torch.zeros(len(rollout))
    ScoredRollout(rollout, good, None, None, scores)
    for name in ("logprobs", "ref_logprobs", "values", "entropy"):
        parts: dict[str, Any] = {
            "logprobs": good,
            "ref_logprobs": good,
            "values": good,
            "scores": scores,
            name: good[:, :-1],
        }
        with pytest.raises(DataError, match=rf"ScoredRollout.{name}"):
            ScoredRollout(rollout, **parts)
    with pytest.raises(DataError, match=r"ScoredRollout.scores: expected numbers of shape \[3\]"):
        ScoredRollout(rollout, good, None, None, torch.zeros(2))


def test_what_ppo_sees_are_the_scores_unless_they_are_shaped() -> None:
    rollout = fake_rollout()
    logprobs, scores = torch.zeros(rollout.ids.shape), torch.tensor([1.0, 2.0, 3.0])
    plain = ScoredRollout(rollout, logprobs, None, None, scores)
    assert torch.equal(plain.shaped_scores, scores)
    assert ScoredRollout(rollout, logprobs, None, None, scores, shaped_scores=2 * scores).scores.tolist() == [1, 2, 3]


def test_selecting_scored_rows_keeps_everything_together() -> None:
    rollout = fake_rollout()
    numbers = torch.arange(rollout.ids.numel(), dtype=torch.float32).view(rollout.ids.shape)
    scores = torch.tensor([1.0, 2.0, 3.0])
    parts, shaped = {"judge": 10 * scores}, -scores
    whole = ScoredRollout(rollout, numbers, numbers + 1, numbers + 2, scores, parts, numbers + 3, shaped, numbers + 4)
    some = whole.select(torch.tensor([2, 0]))
    assert list(some.rollout.texts) == [rollout.texts[2], rollout.texts[0]]
    for name in ("logprobs", "ref_logprobs", "values", "scores", "entropy", "shaped_scores", "token_scores"):
        assert torch.equal(getattr(some, name), getattr(whole, name)[[2, 0]]), name
    assert some.parts["judge"].tolist() == [30.0, 10.0]


def test_older_names_still_work_and_say_what_to_use() -> None:
    """`raw_scores` became `scores`, and approxkl approx_kl, in the stats and among the metrics."""
    rollout = fake_rollout()
    scored = ScoredRollout(rollout, torch.zeros(rollout.ids.shape), None, None, torch.tensor([1.0, 2.0, 3.0]))
    stats = UpdateStats(**{name: float(index) for index, name in enumerate(UpdateStats.__dataclass_fields__)})
    with pytest.warns(MarlDeprecationWarning, match=r"ScoredRollout\.scores"):
        assert scored.raw_scores is scored.scores
    with pytest.warns(MarlDeprecationWarning, match=r"UpdateStats\.approx_kl"):
        assert stats.approxkl == stats.approx_kl
    step = StepStats(1, {"policy/approx_kl": 0.5})
    for numbers in (step, step.metrics):
        with pytest.warns(MarlDeprecationWarning, match="policy/approx_kl"):
            assert numbers["policy/approxkl"] == 0.5
    with pytest.warns(MarlDeprecationWarning, match=r"Rollout\.behavior"):
        assert rollout.captured is rollout.behavior is None
    with pytest.raises(AttributeError, match="no 'row_scores'"):
        _ = scored.row_scores


def test_stats_are_floats_by_name() -> None:
    names = list(UpdateStats.__dataclass_fields__)
    stats = UpdateStats(**{name: float(index) for index, name in enumerate(names)})
    assert stats.as_dict() == {name: float(index) for index, name in enumerate(names)}
    step = StepStats(3, {"objective/scores": 1.5, "objective/kl": 0.25})
    assert (step.reward_mean, step.kl_nats, step["objective/kl"]) == (1.5, 0.25, 0.25)


def test_data_is_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        fake_rollout().texts = []  # type: ignore[misc]  # the point of the test
