"""A reward model reads as its own tokenizer, side and positions say: the score is transformers' for that text alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from marl_core import DataError, MarlWarning, Prompts, Rollout
from marl_core.testing import fake_rollout, tiny_tokenizer
from marl_core.testing.tokenizers import byte_level, framed, wordpiece
from marl_plugins.conversation import answered
from marl_plugins.reward import ModelReward
from marl_plugins.reward_function import columns
from marl_plugins.reward_model import RewardModel

TEXTS = (
    ("hello", " it was very great"),
    ("the movie", " hi"),
    ("it", " was great!"),
    ("was it", " the very movie, hello"),
)
SIZES = {
    "vocab_size": 260,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
LIKE_GPT2 = {"vocab_size": 260, "n_embd": 16, "n_layer": 2, "n_head": 2}
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


def write(folder: Path, kind: str, words: Any, side: str | None = None, **changes: Any) -> str:
    """A classifier with one label, and its tokenizer, as people save them."""
    import transformers as hub

    sizes = LIKE_GPT2 if kind == "GPT2" else SIZES
    made = getattr(hub, f"{kind}Config")(**{**sizes, "num_labels": 1, "initializer_range": 0.5, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        getattr(hub, f"{kind}ForSequenceClassification")(made).save_pretrained(folder)
    words.save_pretrained(folder)
    if side is not None:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "truncation_side": side}))
    return str(folder)


def alone(path: str, texts: Sequence[str], **options: Any) -> Tensor:
    """Transformers by itself, one text at a time."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    words, model = AutoTokenizer.from_pretrained(path), AutoModelForSequenceClassification.from_pretrained(path).eval()
    scores = []
    with torch.no_grad():
        for text in texts:
            given = words(text, return_tensors="pt", **options)
            if model.config.model_type not in ("bert", "roberta"):
                given.pop("token_type_ids", None)
            scores.append(model(**given).logits[0, 0])
    return torch.stack(scores)


def scored(path: str, rollout: Rollout | None = None, **options: Any) -> Tensor:
    found: Tensor = RewardModel(ModelReward(path=path, **options), "cpu")(rollout or fake_rollout(TEXTS))
    return found


def as_chats(rollout: Rollout, chats: Sequence[Any]) -> Rollout:
    """The same tokens with prompts that are chats, read anew."""
    prompts = Prompts(rollout.prompts.ids, rollout.prompts.mask, rollout.prompts.rows, list(chats))
    return Rollout(prompts, rollout.ids, rollout.mask, rollout.texts, rollout.finished)


@pytest.mark.parametrize(
    ("kind", "words", "changes", "end"),
    [
        ("Llama", byte_level(), {"pad_token_id": 0}, "<eos>"),
        ("Llama", framed(byte_level(), ["<bos>"], ["<eos>"]), {"pad_token_id": 0}, ""),
        ("Llama", framed(byte_level(), ["<bos>"]), {"pad_token_id": None}, "<eos>"),
        ("Llama", tiny_tokenizer(pad_is_eos=True), {"pad_token_id": 2}, "<eos>"),
        ("Llama", byte_level(pad_token=None), {"pad_token_id": None}, "<eos>"),
        ("Llama", byte_level(), {"pad_token_id": -1}, "<eos>"),
        ("GPT2", byte_level(), {"n_positions": 64, "pad_token_id": None}, "<eos>"),
        ("Bert", wordpiece(), {"max_position_embeddings": 64, "pad_token_id": 0}, ""),
        ("Roberta", framed(byte_level(), ["<bos>"], ["<eos>"]), {"max_position_embeddings": 64, "pad_token_id": 1}, ""),
    ],
    ids=[
        "llama",
        "llama-eos-added",
        "no-pad-in-config",
        "pad-is-eos",
        "no-pad-at-all",
        "pad-below-0",
        "gpt2",
        "bert",
        "roberta",
    ],
)
def test_what_transformers_gives_for_each_text_alone(
    tmp_path: Path, kind: str, words: Any, changes: dict[str, Any], end: str
) -> None:
    """Texts of four lengths in one batch."""
    path = write(tmp_path / "rm", kind, words, **changes)
    wanted = alone(path, [prompt + response + end for prompt, response in TEXTS])
    assert len(set(wanted.tolist())) == len(TEXTS)
    torch.testing.assert_close(scored(path), wanted, rtol=0, atol=1e-5)


def test_without_the_eos_that_one_may_ask_for(tmp_path: Path) -> None:
    path = write(tmp_path / "rm", "Llama", byte_level(), pad_token_id=0)
    torch.testing.assert_close(
        scored(path, append_eos=False), alone(path, [p + r for p, r in TEXTS]), rtol=0, atol=1e-5
    )


class TestLongTexts:
    long = (("it " * 20, "was very great"), ("hello", " hi"))

    @pytest.mark.parametrize("side", ["left", "right", None])
    @pytest.mark.parametrize(
        ("kind", "words", "changes", "most"),
        [
            ("GPT2", framed(byte_level(), ["<bos>"]), {"n_positions": 24, "pad_token_id": 0}, 24),
            ("Bert", wordpiece(), {"max_position_embeddings": 12, "pad_token_id": 0}, 12),
            (
                "Roberta",
                framed(byte_level(), ["<bos>"], ["<eos>"]),
                {"max_position_embeddings": 20, "pad_token_id": 1},
                18,
            ),
        ],
        ids=["gpt2", "bert", "roberta"],
    )
    def test_are_cut_to_the_models_positions_as_its_tokenizer_cuts(
        self, tmp_path: Path, kind: str, words: Any, changes: dict[str, Any], most: int, side: str | None
    ) -> None:
        path = write(tmp_path / "rm", kind, words, side, **changes)
        end = "<eos>" if kind == "GPT2" else ""
        wanted = alone(path, [p + r + end for p, r in self.long], truncation=True, max_length=most)
        with pytest.warns(MarlWarning, match=rf"fill the {most} tokens .* cut on the {side or 'right'}"):
            found = scored(path, fake_rollout(self.long))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)

    def test_the_tokenizers_own_bound(self, tmp_path: Path) -> None:
        words = byte_level(model_max_length=10)
        path = write(tmp_path / "rm", "Llama", words, "left", pad_token_id=0)
        wanted = alone(path, [p + r + "<eos>" for p, r in self.long], truncation=True, max_length=10)
        torch.testing.assert_close(scored(path, fake_rollout(self.long)), wanted, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(("side", "cut_on"), [("right", "right"), ("left", "left"), (None, "left")])
    def test_max_tokens_keeps_the_response_unless_the_tokenizer_says_otherwise(
        self, tmp_path: Path, side: str | None, cut_on: str
    ) -> None:
        path = write(tmp_path / "rm", "Llama", framed(byte_level(), ["<bos>"]), side, pad_token_id=0)
        reward = RewardModel(ModelReward(path=path, max_tokens=12), "cpu")
        ids = reward._encode(*self.long[0])["input_ids"]
        whole = framed(byte_level(), ["<bos>"])("".join(self.long[0]) + "<eos>").input_ids
        assert ids == (whole[:12] if cut_on == "right" else [1, *whole[-11:]])  # BOS stays


class TestChats:
    begun = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "it was"})

    def test_an_answer_that_is_gone_on_with_is_one_message(self, tmp_path: Path) -> None:
        words = framed(byte_level(), ["<bos>"])
        words.chat_template = TEMPLATE
        path = write(tmp_path / "rm", "Llama", words, pad_token_id=0)
        rollout = as_chats(fake_rollout([("x", " very great")]), [list(self.begun)])
        wanted = alone(path, ["<bos><user>hi<eos><assistant>it was very great<eos>"], add_special_tokens=False)
        torch.testing.assert_close(scored(path, rollout), wanted, rtol=0, atol=1e-5)

    def test_joined_as_a_plain_text(self, tmp_path: Path) -> None:
        path = write(tmp_path / "rm", "Llama", byte_level(), pad_token_id=0)
        rollout = as_chats(fake_rollout([("x", " very great")]), [list(self.begun)])
        wanted = alone(path, ["hi\nit was very great<eos>"])
        torch.testing.assert_close(scored(path, rollout, template="plain"), wanted, rtol=0, atol=1e-5)

    def test_a_tokenizer_without_a_template_is_named(self, tmp_path: Path) -> None:
        path = write(tmp_path / "rm", "Llama", byte_level(), pad_token_id=0)
        rollout = as_chats(fake_rollout([("x", "y")]), [[{"role": "user", "content": "hi"}]])
        with pytest.raises(DataError, match=r"has no chat template. Set reward.template: plain"):
            scored(path, rollout)

    @pytest.mark.parametrize(
        ("content", "joined"),
        [
            ("it was", "it was very"),
            (None, " very"),
            ([{"type": "text", "text": "it was"}], [{"type": "text", "text": "it was very"}]),
            ([{"type": "image"}], [{"type": "image"}, {"type": "text", "text": " very"}]),
        ],
    )
    def test_the_answer_by_itself(self, content: Any, joined: Any) -> None:
        before, answer = answered([self.begun[0], {"role": "assistant", "name": "n", "content": content}], " very")
        assert before == [self.begun[0]]
        assert answer == {"role": "assistant", "name": "n", "content": joined}
        assert answered([self.begun[0]], "yes") == ([self.begun[0]], {"role": "assistant", "content": "yes"})

    def test_reward_functions_get_it_as_one_completion(self) -> None:
        """TRL's GRPO took the begun answer out of the prompt and put it before the completion."""
        rollout = as_chats(fake_rollout([("x", " very"), ("hi", " two")]), [list(self.begun), [self.begun[0]]])
        given = columns(rollout)
        assert given["prompts"] == [[self.begun[0]], [self.begun[0]]]
        assert given["completions"] == [
            [{"role": "assistant", "content": "it was very"}],
            [{"role": "assistant", "content": " two"}],
        ]
        assert rollout.prompts.texts[0] == list(self.begun)  # nothing of the data changed


def test_a_bos_that_the_prompt_spells_out_is_not_given_twice(tmp_path: Path) -> None:
    words = framed(byte_level(), ["<bos>"])
    path = write(tmp_path / "rm", "Llama", words, pad_token_id=0)
    found = scored(path, fake_rollout([("<bos>hello", " hi")]))
    torch.testing.assert_close(found, alone(path, ["hello hi<eos>"]), rtol=0, atol=1e-5)


def test_a_model_whose_scores_move_with_padding_reads_its_texts_one_by_one(tmp_path: Path) -> None:
    path = write(tmp_path / "rm", "Llama", byte_level(), pad_token_id=0)
    reward = RewardModel(ModelReward(path=path), "cpu")
    honest = reward._pass
    widths: list[int] = []

    def moved(rows: Any) -> Tensor:
        """As a model that keeps state over padding would."""
        widths.append(len(rows))
        return honest(rows) + 0.5 * (len(rows) > 1)

    reward._pass = moved  # type: ignore[method-assign]
    torch.testing.assert_close(reward(fake_rollout(TEXTS)), scored(path), rtol=0, atol=1e-5)
    assert widths == [4, 1, 1, 1, 1, 1]
    reward(fake_rollout(TEXTS))
    assert widths[6:] == [1, 1, 1, 1]  # measured once


def test_two_labels_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rm", "Llama", byte_level(), num_labels=2, pad_token_id=0)
    with pytest.raises(DataError, match="has 2 labels; a reward model has one"):
        RewardModel(ModelReward(path=path), "cpu")


def test_one_label_of_several_is_the_score(tmp_path: Path) -> None:
    """By number or by name, and the same as transformers' own logit of it."""
    path = write(tmp_path, "Llama", tiny_tokenizer(), num_labels=2, id2label={0: "BAD", 1: "GOOD"})
    rollout = fake_rollout(TEXTS)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    words, model = AutoTokenizer.from_pretrained(path), AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        expected = torch.stack([model(**words("".join(pair), return_tensors="pt")).logits[0] for pair in TEXTS])
    for label in (0, 1, "BAD", "GOOD"):
        index = ["BAD", "GOOD"].index(label) if isinstance(label, str) else label
        scores = RewardModel(ModelReward(path=path, label=label, append_eos=False), "cpu")(rollout)
        torch.testing.assert_close(scores, expected[:, index], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (None, "has 2 labels; a reward model has one. Set reward.label"),
        (2, "has no label 2; it has 0 (BAD), 1 (GOOD)."),
        ("good", "has no label 'good'; it has 0 (BAD), 1 (GOOD). Did you mean 'GOOD'?"),
    ],
)
def test_a_label_that_is_not_there_is_told_before_the_run(tmp_path: Path, label: Any, said: str) -> None:
    path = write(tmp_path, "Llama", tiny_tokenizer(), num_labels=2, id2label={0: "BAD", 1: "GOOD"})
    (problem,) = ModelReward(path=path, label=label).marl_check()
    assert said in problem
    with pytest.raises(DataError) as caught:
        RewardModel(ModelReward(path=path, label=label), "cpu")
    assert str(caught.value) == problem


def test_what_can_be_no_reward_model_is_told_before_the_run(tmp_path: Path, tiny_folder: str, sft_adapter: str) -> None:
    for path, said in (
        (
            "sentiment-analysis:owner/model",
            "'sentiment-analysis' is the task of a pipeline: write the model's name alone, 'owner/model'",
        ),
        ("./nowhere", "reward.path: there is no folder './nowhere'"),
        (tiny_folder, "is a LlamaForCausalLM, which gives no scores for texts"),
        (sft_adapter, "is an adapter, not a whole model: write {use: adapter, path:"),
        (str(tmp_path), "holds no config.json, so it is no model"),
    ):
        assert said in "".join(ModelReward(path=path).marl_check()), path
    assert list(ModelReward(path="owner/model").marl_check()) == []
