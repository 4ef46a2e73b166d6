"""What a judge reads is what was written: the prompt's text and the response's make the text of both together."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from marl_core import AdapterBank, Prompts, ResponseDecoder, Rollout
from marl_core.config.run_config import SamplingSection, SpeedSection
from marl_core.ppo.sampling.sampler import PolicySampler
from marl_core.ppo.sampling.stop_strings import StopStrings
from marl_core.ppo.texts import REPLACEMENT_CHARACTER
from marl_core.testing import tiny_bank
from marl_core.testing.tokenizers import FAMILIES, byte_fallback, byte_level, metaspace, wordpiece
from marl_plugins.reward_process import step_ends
from marl_plugins.samples import token_ends

TEXT = "the movie was very great, it was! hello, hi."


def whole(words: Any, ids: list[int]) -> str:
    return str(words.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_anywhere_the_two_make_the_whole(family: str) -> None:
    words = FAMILIES[family]()
    ids = words(TEXT).input_ids
    for cut in range(1, len(ids)):
        found = ResponseDecoder(words, ids[:cut]).text(ids[cut:])
        assert whole(words, ids[:cut]) + found == whole(words, ids), cut


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollout_of_ones_own(family: str) -> None:
    """Text prompts; the stop token has no text, and a response of nothing else is empty."""
    words = FAMILIES[family]()
    eos = words.eos_token_id if words.eos_token_id is not None else words.sep_token_id
    prompt = words("the movie was").input_ids
    answer = words("the movie was very great").input_ids[len(prompt) :]
    if family == "wordpiece":  # its end mark stands between
        answer = words("very great", add_special_tokens=False).input_ids
    prompts = Prompts.of([prompt, prompt, prompt], 0, texts=["the movie was"] * 3)
    rollout = Rollout.from_responses(prompts, [[*answer, eos], answer, [eos]], words, [eos])
    assert list(rollout.texts) == [" very great", " very great", ""]


@pytest.mark.parametrize("family", ["metaspace-first", "metaspace-always", "byte-fallback"])
def test_a_word_that_goes_on_gets_no_space(family: str) -> None:
    words = FAMILIES[family]()
    prompt = words("the movie was").input_ids
    ids = words.convert_tokens_to_ids(["n", "o", "t"])
    rollout = Rollout.from_responses(Prompts.of([prompt], 0, texts=["the movie was"]), [ids], words)
    assert rollout.texts[0] == "not"


@pytest.mark.parametrize("family", ["metaspace-first", "byte-fallback", "byte-level"])
def test_an_opened_answer_is_a_text_of_its_own(family: str) -> None:
    """A chat: what stands between the template's header and the answer is the template's, as TRL's batch_decode has it."""
    words = FAMILIES[family]()
    header = [*words("hi", add_special_tokens=False).input_ids, words.eos_token_id]
    answer = words("very great", add_special_tokens=False).input_ids
    chat = [{"role": "user", "content": "hi"}]
    rollout = Rollout.from_responses(Prompts.of([header], 0, texts=[chat]), [answer], words)
    assert rollout.texts == words.batch_decode([answer], skip_special_tokens=True) == ["very great"]


@pytest.mark.parametrize("family", ["metaspace-first", "byte-fallback"])
def test_an_answer_that_is_gone_on_with_keeps_the_space(family: str) -> None:
    words = FAMILIES[family]()
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "it was"}]
    prompt = words("hi it was").input_ids
    answer = words("it was very great").input_ids[-2:]
    rollout = Rollout.from_responses(Prompts.of([prompt], 0, texts=[begun]), [answer], words)
    assert rollout.texts[0] == " very great"


@pytest.mark.parametrize("words", [byte_level(), byte_fallback()], ids=["byte-level", "byte-fallback"])
@pytest.mark.parametrize("letter", ["é", "日", "🙂"])
def test_a_character_that_the_prompt_began(words: Any, letter: str) -> None:
    """Whole in the response, whose first token completes it; the prompt's half of it was nothing yet."""
    ids = words(f"it {letter} was").input_ids
    prompt = whole(words, words("it ").input_ids)
    for cut in range(1, len(ids)):
        head, found = whole(words, ids[:cut]), ResponseDecoder(words, ids[:cut]).text(ids[cut:])
        assert head.rstrip(REPLACEMENT_CHARACTER) + found == f"it {letter} was", cut
    assert prompt.startswith("it")


def test_a_window_that_would_begin_inside_a_character_grows() -> None:
    """Bytes decode together: a run of them that is cut in the middle is broken to its end."""
    words = byte_fallback()
    ids = words("é" * 40).input_ids
    for cut in (31, 32, 33, 60):
        head, found = whole(words, ids[:cut]), ResponseDecoder(words, ids[:cut]).text(ids[cut:])
        assert head.rstrip(REPLACEMENT_CHARACTER) + found == "é" * 40


def test_punctuation_that_wordpiece_closes_up() -> None:
    words = wordpiece()
    prompt, answer = words("hello", add_special_tokens=False).input_ids, words(", hi!", add_special_tokens=False)
    assert ResponseDecoder(words, prompt).text(answer.input_ids) == ", hi!"
    ending = words.convert_tokens_to_ids(["##s", "##o"])
    assert ResponseDecoder(words, prompt).text(ending) == "so"


def test_byte_level_is_what_it_was() -> None:
    words = byte_level()
    for text in (" very great", "\n\nhi", "", " "):
        ids = words(text).input_ids
        assert ResponseDecoder(words, words("the movie was").input_ids).text(ids) == whole(words, ids) == text


@pytest.mark.parametrize("family", ["metaspace-first", "byte-fallback"])
def test_a_stop_string_may_begin_with_the_space(family: str) -> None:
    words = FAMILIES[family]()
    prompt = words("the movie").input_ids
    rows = [
        words("the movie was great").input_ids[len(prompt) :],
        words("the movie very great").input_ids[len(prompt) :],
    ]
    decoders = ResponseDecoder.of(words, Prompts.of([prompt] * 2, 0, texts=["the movie"] * 2))
    strings = StopStrings.of([" was"], words)
    assert strings is not None
    assert strings.met(torch.tensor([row[:1] for row in rows]), decoders).tolist() == [True, False]
    assert strings.met(torch.tensor([row[:1] for row in rows])).tolist() == [False, False]


@pytest.mark.parametrize("path", ["marl", "transformers"])
def test_sampled_texts_go_on_with_their_prompts(path: Literal["marl", "transformers"]) -> None:
    """Both ways of sampling, with and without stop strings."""
    bank = spaced_bank()
    prompts = Prompts.of([bank.tokenizer(text).input_ids for text in ("the movie was", "hello")], 0)
    for strings in ([], [" was", "z"]):
        part = SamplingSection(max_new_tokens=12, stop_strings=strings)
        rollout = PolicySampler(bank, None, part, (2,), SpeedSection(decode=path))(prompts.repeat(8), 1)
        for row in range(len(rollout)):
            ids = rollout.sequence_ids[row][rollout.sequence_mask[row]].tolist()
            text = whole(bank.tokenizer, ids).removeprefix(str(rollout.prompts.texts[row]))
            assert rollout.texts[row] == text[: min([text.find(s) for s in strings if s in text], default=len(text))]
    assert any(text.startswith(" ") for text in rollout.texts)


def spaced_bank() -> AdapterBank:
    """The tiny model with a tokenizer of words with spaces; ids that it lacks are never sampled often enough to matter."""
    bank = tiny_bank(vocab_size=len(metaspace()))
    bank.tokenizer = metaspace()
    return bank


def test_ends_of_tokens_and_steps_count_the_space() -> None:
    words = metaspace()
    prompt, answer = words("it was").input_ids, words("very great , hello").input_ids
    decoder = ResponseDecoder(words, prompt)
    text = decoder.text(answer)
    assert text == " very great , hello"
    assert token_ends(answer, len(text), words, decoder) == [5, 11, 12, 13, 19]
    assert step_ends(answer, [" very great ", ", hello"], decoder.text) == [2, 4]


def test_ends_of_tokens_in_a_long_response() -> None:
    """Beyond the window too, where tokens are decoded with a few before them."""
    words = metaspace()
    prompt, answer = words("it was").input_ids, words(" ".join(["very great movie"] * 20)).input_ids
    decoder = ResponseDecoder(words, prompt)
    ends = token_ends(answer, len(decoder.text(answer)), words, decoder)
    assert ends == [len(decoder.text(answer[: at + 1])) for at in range(len(answer))]
