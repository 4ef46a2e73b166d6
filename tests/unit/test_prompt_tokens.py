"""What enters the model is what was meant: what tokenizers add, what a cut leaves, a template's options, tokens that end."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from marl_core import ConfigError, DataError, MarlWarning, Prompts
from marl_core.bank.room import position_limit, vocabulary_of
from marl_core.config.run_config import DataSection, SamplingSection
from marl_core.data.prompts import PromptData
from marl_core.ppo.sampling.sampler import PolicySampler
from marl_core.ppo.sampling.stop_tokens import stop_ids
from marl_core.testing import tiny_bank, tiny_model, tiny_tokenizer
from marl_core.testing.tokenizers import byte_fallback, byte_level, framed, metaspace, wordpiece

CHAT = (
    "{{ bos_token }}{% if tools %}[{% for t in tools %}{{ t | tojson }}{% endfor %}]{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.content is defined %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endif %}"
    "{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if not enable_thinking | default(true) %}<quiet>{% endif %}{% endif %}"
)
REAL_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful "
        "AI assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama": (
        "{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
        "+ message['content'] | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + eos_token }}"
        "{% elif message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + eos_token }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '\n<|assistant|>' }}{% endif %}{% endfor %}"
    ),
}
"""As SmolLM2 and Qwen, Llama 3, and Zephyr ship them, a little shortened."""
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
TALK = [{"role": "user", "content": "hi"}]


def load(folder: Path, rows: Sequence[dict[str, Any]], words: Any, room: int = 400, **options: Any) -> PromptData:
    file = folder / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return PromptData.load(DataSection(prompts=str(file), **options), words, room)


def talker() -> Any:
    words = framed(byte_level(), ["<bos>"], ["<eos>"])
    words.chat_template = CHAT
    return words


class TestWhatTheTokenizerAdds:
    @pytest.mark.parametrize(
        ("words", "first"),
        [
            (byte_level(), []),
            (framed(byte_level(), [], ["<eos>"]), []),
            (framed(byte_level(), ["<bos>"], ["<eos>"]), ["<bos>"]),
            (framed(metaspace(), [], ["<eos>"]), []),
            (framed(metaspace("always"), ["<bos>"], ["<eos>", "<eos>"]), ["<bos>"]),
            (byte_fallback(), ["<bos>"]),
            (wordpiece(), ["[CLS]"]),
            (framed(byte_level(), ["<pad>", "<bos>"], ["<unk>"]), ["<pad>", "<bos>"]),
        ],
        ids=["nothing", "eos", "bos-eos", "t5", "two-at-the-end", "llama", "bert", "glm"],
    )
    def test_stays_in_front_and_goes_at_the_end(self, tmp_path: Path, words: Any, first: list[str]) -> None:
        data = load(tmp_path, [{"prompt": "the movie"}, {"prompt": "it"}], words)
        for text, tokens in zip(("the movie", "it"), data.tokens, strict=True):
            own = words(text, add_special_tokens=False).input_ids
            assert list(tokens) == words.convert_tokens_to_ids(first) + own

    def test_an_end_that_the_text_spells_out_stays(self, tmp_path: Path) -> None:
        words = framed(byte_level(), ["<bos>"], ["<eos>"])
        data = load(tmp_path, [{"prompt": "hi<eos>"}, {"prompt": "<bos>hi<eos><eos>"}], words, on_control="parse")
        assert list(data.tokens[0]) == [1, *byte_level()("hi").input_ids, 2]
        assert list(data.tokens[1]) == [1, *byte_level()("hi").input_ids, 2, 2]

    def test_add_eos_token_of_the_saved_config(self, tmp_path: Path) -> None:
        """The option by which people's tokenizers append it."""
        from transformers import LlamaTokenizer

        pieces = {piece: at for at, piece in enumerate(["<unk>", "<s>", "</s>", "▁", "▁h", "i", "h"])}
        words = LlamaTokenizer(vocab=pieces, merges=[("▁", "h")], add_bos_token=True, add_eos_token=True)
        assert words("hi").input_ids[-1] == words.eos_token_id
        (tokens,) = load(tmp_path, [{"prompt": "hi"}], words).tokens
        assert list(tokens) == words("hi").input_ids[:-1]
        assert tokens[0] == words.bos_token_id

    def test_a_chat_gets_neither_twice(self, tmp_path: Path) -> None:
        words = talker()
        data = load(tmp_path, [{"prompt": TALK}], words)
        assert words.decode(list(data.tokens[0])) == "<bos><|user|>hi<|end|><|assistant|>"


class TestCut:
    @pytest.mark.parametrize(
        ("words", "head"),
        [
            (byte_level(), 0),
            (framed(byte_level(), ["<bos>"], ["<eos>"]), 1),
            (framed(byte_level(), ["<pad>", "<bos>"]), 2),
            (byte_fallback(), 1),
            (wordpiece(), 1),
        ],
    )
    def test_a_text_keeps_what_the_tokenizer_puts_first(self, tmp_path: Path, words: Any, head: int) -> None:
        text = "the movie was very great and it was long"
        whole = list(load(tmp_path, [{"prompt": text}], words).tokens[0])
        data = load(tmp_path, [{"prompt": text}, {"prompt": "hi"}], words, max_prompt_tokens=6, on_long="truncate-left")
        assert list(data.tokens[0]) == whole[:head] + whole[len(whole) - 6 + head :]
        assert list(data.tokens[1]) == list(load(tmp_path, [{"prompt": "hi"}], words).tokens[0])
        assert list(data.cut_tokens) == [len(whole) - 6, 0]

    def test_a_bos_that_the_template_of_columns_writes_stays(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"prompt_template": "<bos>{q}", "max_prompt_tokens": 4, "on_long": "truncate-left"}
        (tokens,) = load(tmp_path, [{"q": "long text"}], byte_level(), **options).tokens
        assert byte_level().decode(list(tokens)) == "<bos>ext"

    def test_no_room_beside_what_comes_first(self, tmp_path: Path) -> None:
        words = framed(byte_level(), ["<pad>", "<bos>"])
        with pytest.raises(DataError, match=r"exceeds 2 tokens, even without the text that may be cut away \(row 1\)"):
            load(tmp_path, [{"prompt": "hello"}], words, max_prompt_tokens=2, on_long="truncate-left")

    def test_it_is_said(self, tmp_path: Path) -> None:
        with pytest.warns(
            MarlWarning,
            match=r"1 of 2 prompts of .* was cut to 3 tokens, the oldest text is gone \(at most 2 tokens of one prompt",
        ):
            load(
                tmp_path,
                [{"prompt": "hello"}, {"prompt": "hi"}],
                byte_level(),
                max_prompt_tokens=3,
                on_long="truncate-left",
            )

    @pytest.mark.parametrize("limit", [45, 60, 75])
    def test_a_chat_keeps_its_opening_its_system_message_and_the_answers(self, tmp_path: Path, limit: int) -> None:
        words = talker()
        talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "abcdefghij" * 9}]
        options: dict[str, Any] = {"max_prompt_tokens": limit + 20, "on_long": "truncate-left"}
        (tokens,) = load(tmp_path, [{"prompt": talk}], words, **options).tokens
        text = words.decode(list(tokens))
        assert len(tokens) == limit + 20  # a byte a token: nothing is lost that had room
        assert text.startswith("<bos><|system|>Be kind.<|end|><|user|>")
        assert text.endswith("j<|end|><|assistant|>")

    def test_the_oldest_text_goes_first(self, tmp_path: Path) -> None:
        words = talker()
        talk: list[dict[str, Any]] = [
            {"role": "user", "content": "a" * 30},
            {"role": "assistant", "content": "b" * 30},
            {"role": "user", "content": [{"type": "text", "text": "c" * 10}, {"type": "text", "text": "d" * 10}]},
        ]
        frame = len(
            words.apply_chat_template([{**m, "content": ""} for m in talk], add_generation_prompt=True)["input_ids"]
        )
        for room, left in ((70, "b" * 30), (45, "b" * 25), (15, "c" * 5), (3, "")):
            options: dict[str, Any] = {"max_prompt_tokens": frame + room, "on_long": "truncate-left"}
            (tokens,) = load(tmp_path, [{"prompt": talk}], words, **options).tokens
            text = words.decode(list(tokens))
            assert len(tokens) == frame + room
            assert text.startswith("<bos><|user|>")
            assert text.endswith("d<|end|><|assistant|>")
            assert left in text

    def test_a_begun_answer_stays(self, tmp_path: Path) -> None:
        words = talker()
        talk = [{"role": "user", "content": "a" * 50}, {"role": "assistant", "content": "Well, I think"}]
        options: dict[str, Any] = {"max_prompt_tokens": 50, "on_long": "truncate-left"}
        (tokens,) = load(tmp_path, [{"prompt": talk}], words, **options).tokens
        text = words.decode(list(tokens))
        assert text.startswith("<bos><|user|>a")
        assert text.endswith("a<|end|><|assistant|>Well, I think")
        assert len(tokens) == 50

    def test_the_cut_lies_in_the_columns_and_not_in_the_template(self, tmp_path: Path) -> None:
        """A template of columns that writes a chat out keeps its marks."""
        template = "<bos><|user|>Sum up: {text}\n{ask}<eos><|assistant|>"
        row = {"text": "a" * 40, "ask": "b" * 20}
        frame = len(byte_level()(template.format(text="", ask="")).input_ids)
        for room, left in ((30, "a" * 10 + "\n" + "b" * 20), (15, "\n" + "b" * 15)):
            options: dict[str, Any] = {"prompt_template": template, "on_control": "parse", "on_long": "truncate-left"}
            data = load(tmp_path, [row], byte_level(), max_prompt_tokens=frame + room, **options)
            assert byte_level().decode(list(data.tokens[0])) == f"<bos><|user|>Sum up: {left}<eos><|assistant|>"
            assert list(data.seen_texts) == [byte_level().decode(list(data.tokens[0]))]

    def test_in_the_columns_of_a_template_that_is_a_chats_message(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"prompt_template": "Sum up: {text}", "chat": True, "on_long": "truncate-left"}
        data = load(tmp_path, [{"text": "a" * 60}], talker(), max_prompt_tokens=70, system_prompt="Be kind.", **options)
        text = talker().decode(list(data.tokens[0]))
        assert re.fullmatch(
            r"<bos><\|system\|>Be kind\.<\|end\|><\|user\|>Sum up: a{1,59}<\|end\|><\|assistant\|>", text
        )
        assert len(data.tokens[0]) == 70
        assert data.seen_texts[0][-1]["content"] in text

    @pytest.mark.parametrize("template", REAL_TEMPLATES)
    def test_real_templates_keep_their_frame(self, tmp_path: Path, template: str) -> None:
        words = framed(byte_level(), ["<bos>"], ["<eos>"])
        words.chat_template = REAL_TEMPLATES[template]
        talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "abcdefghij" * 20}]
        whole = str(words.apply_chat_template(talk, add_generation_prompt=True, tokenize=False))
        before, after = whole.split("abcdefghij" * 20)
        limit = len(words(before + after, add_special_tokens=False).input_ids) + 50
        data = load(tmp_path, [{"prompt": talk}], words, max_prompt_tokens=limit, on_long="truncate-left")
        text = words.decode(list(data.tokens[0]))
        assert text.startswith(before)
        assert text.endswith(after)
        assert 1 <= len(text) - len(before) - len(after) <= 50
        assert data.seen_texts[0][-1]["content"] == text.removeprefix(before).removesuffix(after)
        assert list(data.cut_tokens) == [len(words(whole, add_special_tokens=False).input_ids) - len(data.tokens[0])]

    def test_what_is_seen_of_a_text_is_what_its_tokens_say(self, tmp_path: Path) -> None:
        for words in (byte_level(), framed(byte_level(), ["<bos>"], ["<eos>"])):
            data = load(tmp_path, [{"prompt": "0123456789"}], words, max_prompt_tokens=5, on_long="truncate-left")
            assert list(data.texts) == ["0123456789"]  # what rewards read
            assert list(data.seen_texts) == ["56789" if len(words("a").input_ids) == 1 else "6789"]
            batch = data.take([0, 0])
            assert batch.repeat(2).select(slice(1, 3)).seen(1) == data.seen_texts[0]
            assert [batch.cut_of(0), batch.repeat(2).select(slice(1, 3)).to("cpu").cut_of(1)] == [*data.cut_tokens] * 2

    def test_a_template_that_has_no_room_is_said_by_row(self, tmp_path: Path) -> None:
        talk = [{"role": "system", "content": "s" * 90}, {"role": "user", "content": "hello"}]
        rows: list[dict[str, Any]] = [{"prompt": TALK}, {"prompt": talk}]
        with pytest.raises(DataError, match=r"exceeds 60 tokens, even without .* \(row 2\)"):
            load(tmp_path, rows, talker(), max_prompt_tokens=60, on_long="truncate-left")


class TestOptionsOfTheTemplate:
    def wanted(self, **options: Any) -> list[int]:
        return list(talker().apply_chat_template(TALK, add_generation_prompt=True, return_dict=False, **options))

    @pytest.mark.parametrize("as_json", [False, True], ids=["dict", "text"])
    def test_a_rows_own(self, tmp_path: Path, as_json: bool) -> None:
        held: Any = json.dumps if as_json else lambda value: value
        row = {"prompt": TALK, "chat_template_kwargs": held({"enable_thinking": False}), "tools": held([TOOL])}
        (tokens,) = load(tmp_path, [row], talker()).tokens
        assert list(tokens) == self.wanted(enable_thinking=False, tools=[TOOL])

    @pytest.mark.parametrize("nothing", [None, "", [], {}, "[]", "{}"])
    def test_nothing_in_the_columns(self, tmp_path: Path, nothing: Any) -> None:
        rows: list[dict[str, Any]] = [
            {"prompt": TALK, "tools": nothing},
            {"prompt": TALK, "chat_template_kwargs": nothing},
        ]
        for tokens in load(tmp_path, rows, talker()).tokens:
            assert list(tokens) == self.wanted()

    def test_the_runs_and_a_rows(self, tmp_path: Path) -> None:
        rows: list[dict[str, Any]] = [
            {"prompt": TALK},
            {"prompt": TALK, "chat_template_kwargs": {"enable_thinking": True}},
        ]
        options: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False, "tools": [TOOL]}}
        data = load(tmp_path, rows, talker(), **options)
        assert list(data.tokens[0]) == self.wanted(enable_thinking=False, tools=[TOOL])
        assert list(data.tokens[1]) == self.wanted(enable_thinking=True, tools=[TOOL])

    def test_out_of_parquet(self, tmp_path: Path) -> None:
        """Structs hold the keys of all rows: what is None there was never written, and a template must not see it."""
        import pyarrow
        import pyarrow.parquet

        other = {"type": "function", "function": {"name": "g", "strict": True}}
        calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
        rows: list[dict[str, Any]] = [
            {"prompt": TALK, "chat_template_kwargs": {"enable_thinking": False}, "tools": [TOOL]},
            {
                "prompt": [
                    *TALK,
                    {"role": "assistant", "tool_calls": calls},
                    {"role": "tool", "content": "1", "name": "f"},
                ]
            },
            {"prompt": TALK, "chat_template_kwargs": {"other": 1}, "tools": [other]},
        ]
        rows[0]["tools"] = [{"type": "function", "function": {"name": "f", "strict": False}}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
        words = talker()
        data = PromptData.load(DataSection(prompts=str(tmp_path / "p.parquet")), words, 900)
        for row, tokens in zip(rows, data.tokens, strict=True):
            options: dict[str, Any] = {**row.get("chat_template_kwargs", {}), "tools": row.get("tools")}
            wanted = words.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False, **options)
            assert words.decode(list(tokens)) == wanted

    def test_one_of_several_templates(self, tmp_path: Path) -> None:
        words = talker()
        words.chat_template = {
            "default": "D{{ messages[0].content }}",
            "rag": "R{{ messages[0].content }}",
            "tool_use": "T",
        }
        rows: list[dict[str, Any]] = [
            {"prompt": TALK},
            {"prompt": TALK, "chat_template_kwargs": {"chat_template": "rag"}},
            {"prompt": TALK, "tools": [TOOL]},
        ]
        assert [words.decode(list(tokens)) for tokens in load(tmp_path, rows, words).tokens] == ["Dhi", "Rhi", "T"]
        words.chat_template = {"a": "A", "b": "B"}
        with pytest.raises(DataError, match=r"name one of several templates in data.chat_template_kwargs"):
            load(tmp_path, [{"prompt": TALK}], words)

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            ("chat_template_kwargs", {"add_generation_prompt": False}, "gives add_generation_prompt, which marl sets"),
            ("chat_template_kwargs", "quiet", "is a text that is no JSON"),
            ("chat_template_kwargs", [1], "holds no options of a chat template by name"),
            ("tools", "hammer, saw", "is a text that is no JSON"),
            ("tools", ["hammer"], "holds no list of JSON schemas"),
            ("tools", {"a": 1}, "holds no list of JSON schemas"),
        ],
    )
    def test_what_is_none_is_said_by_row(self, tmp_path: Path, column: str, value: Any, message: str) -> None:
        with pytest.raises(DataError, match=rf"column '{column}' of row 2 of .* {message}"):
            load(tmp_path, [{"prompt": TALK}, {"prompt": TALK, column: value}], talker())
        data = load(tmp_path, [{"prompt": "a text", column: value}], talker())  # a column of the data like any other
        assert data.rows[0][column] == value

    def test_the_runs_need_a_chat_and_are_no_arguments_of_the_call(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"data.chat_template_kwargs: row 1 of .* is a text.*Set data.chat: true"):
            load(tmp_path, [{"prompt": "hi"}], talker(), chat_template_kwargs={"enable_thinking": False})
        with pytest.raises(ConfigError, match="add_generation_prompt: marl sets this itself"):
            DataSection(prompts="p.jsonl", chat_template_kwargs={"add_generation_prompt": True})

    def test_control_tokens_in_them_are_a_rows_too(self, tmp_path: Path) -> None:
        row = {"prompt": TALK, "tools": [{**TOOL, "description": "<eos>"}]}
        with pytest.raises(DataError, match="holds control tokens such as '<eos>'"):
            load(tmp_path, [row], talker())


class TestMessages:
    @pytest.mark.parametrize(
        "talk",
        [
            [{"role": "developer", "content": "d"}, *TALK],
            [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            [
                *TALK,
                {"role": "assistant", "content": None, "tool_calls": [TOOL]},
                {"role": "tool", "content": "1", "name": "f"},
            ],
            [*TALK, {"role": "assistant", "tool_calls": [TOOL]}, {"role": "tool", "content": "1", "tool_call_id": "x"}],
        ],
    )
    def test_as_apply_chat_template_renders_them(self, tmp_path: Path, talk: list[dict[str, Any]]) -> None:
        words = talker()
        (tokens,) = load(tmp_path, [{"prompt": talk}], words).tokens
        said = [{key: value for key, value in message.items() if value is not None} for message in talk]
        # transformers 5.17 hands a null on to the template, where newer ones leave it out
        assert list(tokens) == words.apply_chat_template(said, add_generation_prompt=True, return_dict=False)

    def test_a_developers_message_is_a_system_message(self, tmp_path: Path) -> None:
        talk = [{"role": "developer", "content": "own"}, *TALK]
        data = load(tmp_path, [{"prompt": talk}], talker(), system_prompt="ours")
        assert data.texts[0] == talk

    def test_nothing_said(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"1 prompt of .* is empty \(row 2\)"):
            load(tmp_path, [{"prompt": TALK}, {"prompt": [{"role": "user", "content": " "}]}], talker())

    def test_whatever_holds_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A data set's rows may hold arrays and tuples."""
        import datasets

        rows: list[dict[str, Any]] = [
            {"prompt": np.array([{"role": "user", "content": "hi"}], dtype=object)},
            {"prompt": tuple(TALK)},
        ]
        monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: rows)
        data = PromptData.load(DataSection(prompts="owner/chats"), talker(), 200)
        assert list(data.texts) == [TALK, TALK]


class TestEndTokens:
    @pytest.mark.parametrize(
        "given", [2, [2, 5], (2, 5), {2, 5}, torch.tensor([2, 5]), torch.tensor(2), np.array([2, 5]), np.int64(2), None]
    )
    def test_whatever_holds_them(self, given: Any) -> None:
        found = stop_ids(tiny_tokenizer(), SamplingSection(), given, 260)
        assert found == (
            [2] if given is None or np.ndim(list(given) if isinstance(given, set) else given) == 0 else [2, 5]
        )

    @pytest.mark.parametrize("foreign", [260, 300, -1])
    def test_those_outside_the_vocabulary_are_left_out_and_said(self, foreign: int) -> None:
        with pytest.warns(MarlWarning, match=rf"{foreign} of this tokenizer or its generation_config are outside"):
            assert stop_ids(tiny_tokenizer(), SamplingSection(), [2, foreign], 260) == [2]

    def test_one_that_is_the_pad_token_too(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            words = tiny_tokenizer(pad_is_eos=True)
            assert stop_ids(words, SamplingSection(), [2, 0], 260) == [0, 2]

    def test_none_is_left(self) -> None:
        words = tiny_tokenizer()
        words.eos_token = None
        with pytest.raises(ConfigError, match=r"has no EOS token; name one in sampling.stop"):
            stop_ids(words, SamplingSection(), None, 260)
        assert stop_ids(words, SamplingSection(stop=["a"]), None, 260) == words("a").input_ids
        with pytest.raises(ConfigError, match="no EOS token that the model knows"), pytest.warns(MarlWarning):
            stop_ids(words, SamplingSection(), [999], 260)

    def test_a_stop_that_is_asked_for_must_be_there(self) -> None:
        words = tiny_tokenizer()
        words.add_tokens(["<|im_end|>"], special_tokens=True)
        assert stop_ids(words, SamplingSection(stop=["<|im_end|>"]), None, 261) == [2, 260]
        with pytest.raises(ConfigError, match=r"is token 260, and the model has 260 tokens only"):
            stop_ids(words, SamplingSection(stop=["<|im_end|>"]), None, 260)
        with pytest.raises(ConfigError, match="doesn't know"):
            stop_ids(wordpiece(), SamplingSection(stop=["ß"]), 2, 260)

    def test_prompts_with_tokens_that_the_model_lacks(self, tmp_path: Path) -> None:
        words = tiny_tokenizer()
        words.add_tokens(["movie"])
        (tmp_path / "p.jsonl").write_text('{"prompt": "hi"}\n{"prompt": "a movie"}\n', encoding="utf-8")
        part = DataSection(prompts=str(tmp_path / "p.jsonl"))
        with pytest.raises(DataError, match=r"row 2 of .* holds token 260, and the model has embeddings for 260"):
            PromptData.load(part, words, 100, 260)
        assert len(PromptData.load(part, words, 100, 261)) == 2

    def test_prompts_of_ones_own_that_end_in_an_added_eos_are_said(self) -> None:
        """A tokenizer called by hand: nothing can tell its EOS from a meant one, so nothing is taken away in silence."""
        bank = tiny_bank()
        bank.tokenizer = framed(byte_level(), ["<bos>"], ["<eos>"])
        part = SamplingSection(max_new_tokens=1)
        ended = Prompts.of([bank.tokenizer(text).input_ids for text in ("hi", "you")], 0)
        with pytest.warns(MarlWarning, match="every prompt ends in the EOS that this tokenizer appends"):
            PolicySampler(bank, None, part, (2,))(ended, None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            PolicySampler(bank, None, part, (2,))(
                Prompts.of([bank.tokenizer("hi").input_ids[:-1], ended.ids[1].tolist()], 0), None
            )


def llama(**changes: Any) -> Any:
    return tiny_model(**changes)


def small(kind: str, **changes: Any) -> Any:
    import transformers as hub

    sizes = {
        "vocab_size": 40,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    of_gpt2 = {"vocab_size": 40, "n_embd": 8, "n_layer": 1, "n_head": 2}
    of_mpt = {"vocab_size": 40, "d_model": 8, "n_layers": 1, "n_heads": 2}
    of_opt = {**sizes, "ffn_dim": 8, "word_embed_proj_dim": 8}
    known: dict[str, dict[str, Any]] = {"GPT2": of_gpt2, "MPT": of_mpt, "Mpt": of_mpt, "OPT": of_opt}
    config = getattr(hub, f"{kind}Config")(**known.get(kind, sizes), **changes)
    return getattr(hub, f"{kind}ForCausalLM" if kind not in ("GPT2", "Bert") else f"{kind}LMHeadModel")(config)


@pytest.mark.parametrize(
    ("model", "positions"),
    [
        (lambda: llama(max_position_embeddings=99), 99),
        (lambda: small("GPT2", n_positions=17), 17),
        (lambda: small("Mpt", max_seq_len=18), 18),
        (lambda: small("OPT", max_position_embeddings=19), 19),
        (lambda: small("Roberta", max_position_embeddings=22, pad_token_id=1, is_decoder=True), 20),
        (lambda: small("Bert", max_position_embeddings=21, is_decoder=True), 21),
        (lambda: small("Mamba", state_size=4), None),
    ],
    ids=["rotary", "gpt2", "mpt", "opt", "roberta", "bert", "mamba"],
)
def test_positions_that_a_model_has(model: Any, positions: int | None) -> None:
    """Where positions are a table: one token more fails in transformers itself."""
    made = model() if callable(model) else model
    if type(made).__name__.startswith("Bert"):
        made = made.eval()
    assert position_limit(made) == positions
    assert vocabulary_of(made) in (40, 260)
    if type(made).__name__.startswith(("GPT2", "OPT", "Roberta")):
        ids = torch.full((1, positions or 1), 5)
        with torch.no_grad():
            made.eval()(input_ids=ids)
            with pytest.raises((IndexError, RuntimeError)):
                made(input_ids=torch.cat([ids, ids[:, :1]], dim=1))


def test_a_stretched_rotary_model_has_its_stretched_positions() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    assert position_limit(llama(max_position_embeddings=32, rope_parameters=rope)) == 128
    assert position_limit(llama(max_position_embeddings=128, rope_parameters=rope)) == 128
