"""Stop strings: the row ends with the token that completes one, on both decode paths, and rewards read what came before."""

from __future__ import annotations

import re
from typing import Any, Literal

import pytest
import torch

from marl_core import AdapterBank, ConfigError, Prompts
from marl_core.config.run_config import SamplingSection, ShapingSection, SpeedSection
from marl_core.ppo.sampling.sampler import PolicySampler
from marl_core.ppo.sampling.stop_strings import StopStrings
from marl_core.ppo.shaping import RewardStats, shape_scores
from marl_core.testing import tiny_bank, tiny_tokenizer

EOS = 2
Path = Literal["marl", "transformers"]


@pytest.fixture(scope="module")
def bank() -> AdapterBank:
    return tiny_bank()


@pytest.fixture
def prompts(bank: AdapterBank) -> Prompts:
    return Prompts.of([bank.tokenizer(text).input_ids for text in ("A good", "Bad", "I", "It was so")], 0)


def first_end(ids: list[int], strings: tuple[str, ...], most: int) -> tuple[int, bool]:
    """The definition, word by word: the shortest prefix whose text holds a string, or that ends with EOS."""
    words = tiny_tokenizer()
    for length in range(1, min(len(ids), most) + 1):
        text = words.decode(ids[:length], skip_special_tokens=True)
        if ids[length - 1] == EOS or any(string in text for string in strings):
            return length, True
    return min(len(ids), most), False


@pytest.mark.parametrize("path", ["marl", "transformers"])
@pytest.mark.parametrize("limits", [None, [3, 7, 1, 12]])
def test_a_row_ends_where_the_definition_says(
    bank: AdapterBank, prompts: Prompts, path: Path, limits: list[int] | None
) -> None:
    """Strings of one and of several tokens, cut out of what the model writes without them."""
    given = None if limits is None else torch.tensor(limits).repeat_interleave(3)
    many = prompts.repeat(3)
    speed, sampling = SpeedSection(decode=path), SamplingSection(max_new_tokens=12)
    free = PolicySampler(bank, None, sampling, (EOS,), speed)(many, 4)
    found = (re.search(rf"[!-~]{{{length}}}", free.texts[row]) for row, length in ((9, 2), (10, 2), (11, 1)))
    strings = tuple(match.group() for match in found if match is not None)
    assert strings
    stopped = PolicySampler(bank, None, sampling.model_copy(update={"stop_strings": list(strings)}), (EOS,), speed)(
        many, 4, limits=given
    )
    ends = set()
    for row in range(len(many)):
        most = 12 if given is None else int(given[row])
        length, finished = first_end(free.ids[row][free.mask[row]].tolist(), strings, most)
        assert int(stopped.lengths[row]) == length, row
        assert bool(stopped.finished[row]) == finished, row
        if path == "marl":  # one uniform number for each row and place: the same tokens as without strings
            assert stopped.ids[row, :length].tolist() == free.ids[row, :length].tolist()
        whole = str(bank.tokenizer.decode(stopped.ids[row, :length].tolist(), skip_special_tokens=True))
        places = [whole.find(string) for string in strings if string in whole]
        assert stopped.texts[row] == (whole[: min(places)] if places else whole)
        ends.add((bool(places), finished))
    assert (True, True) in ends
    assert limits is None or (False, False) in ends


def test_both_paths_agree_where_nothing_is_drawn(bank: AdapterBank, prompts: Prompts) -> None:
    greedy = SamplingSection(max_new_tokens=10, top_k=1)
    text = PolicySampler(bank, None, greedy, (EOS,))(prompts, 0).texts[1]
    strings = greedy.model_copy(update={"stop_strings": [text[3:6]]})
    one, two = (
        PolicySampler(bank, None, strings, (EOS,), SpeedSection(decode=path))(prompts, 0)
        for path in ("marl", "transformers")
    )
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.mask, two.mask)
    assert torch.equal(one.finished, two.finished)
    assert list(one.texts) == list(two.texts)
    assert bool(one.finished[1])


def test_a_string_in_the_prompt_stops_nothing(bank: AdapterBank) -> None:
    many = Prompts.of([bank.tokenizer("end").input_ids] * 4, 0)
    for path in ("marl", "transformers"):
        part = SamplingSection(max_new_tokens=5, stop_strings=["end", "nd"])
        rollout = PolicySampler(bank, None, part, (EOS,), SpeedSection(decode=path))(many, 1)
        assert int(rollout.lengths.max()) == 5


def test_stopped_is_finished_for_the_missing_eos_penalty(bank: AdapterBank, prompts: Prompts) -> None:
    free = PolicySampler(bank, None, SamplingSection(max_new_tokens=6), (EOS,))(prompts, 4)
    part = SamplingSection(max_new_tokens=6, stop_strings=[free.texts[0][2]])
    rollout = PolicySampler(bank, None, part, (EOS,))(prompts, 4)
    part_of_shaping = ShapingSection(missing_eos_penalty=3.0)
    shaped = shape_scores(torch.zeros(len(prompts)), rollout.finished, part_of_shaping, RewardStats())
    assert bool(rollout.finished[0])
    assert shaped.tolist() == [0.0 if done else -3.0 for done in rollout.finished.tolist()]


class TestText:
    def test_special_tokens_inside_a_string_are_no_text(self) -> None:
        words = tiny_tokenizer()
        strings = StopStrings.of(["ab"], words)
        assert strings is not None
        a, b = words("ab").input_ids
        rows = torch.tensor([[a, 1, 1, b], [a, a, a, a]])
        assert strings.met(rows).tolist() == [True, False]

    def test_a_character_of_several_tokens_counts_when_it_is_whole(self) -> None:
        words = tiny_tokenizer()
        ids = words("x\u00e9").input_ids
        strings = StopStrings.of(["\u00e9"], words)
        assert strings is not None
        assert [bool(strings.met(torch.tensor([ids[:n]]))[0]) for n in range(1, len(ids) + 1)] == [False] * (
            len(ids) - 1
        ) + [True]

    def test_a_long_response_is_searched_to_its_end(self) -> None:
        words = tiny_tokenizer()
        strings = StopStrings.of(["\n\nUser:"], words)
        assert strings is not None
        ids = words("x" * 200 + "\n\nUser:").input_ids
        assert strings.met(torch.tensor([ids])).tolist() == [True]
        assert strings.met(torch.tensor([ids[:-1]])).tolist() == [False]

    def test_the_first_of_several_cuts(self) -> None:
        strings = StopStrings.of(["END", "\n"], tiny_tokenizer())
        assert strings is not None
        assert strings.cut("one\ntwo END") == "one"
        assert strings.cut("none") == "none"
        assert StopStrings.of([], tiny_tokenizer()) is None


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"stop_strings": [""]}, "at least 1 character"),
        ({"stop_strings": ["x"], "min_new_tokens": 2}, "min_new_tokens with stop_strings"),
    ],
)
def test_what_cannot_be(part: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingSection(**part)
