"""From a row to what the model reads: templates of columns, chats, system prompts, and who may write control tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from marl_core import ConfigError, DataError, MarlWarning, Rollout
from marl_core.artifacts.rows import read_rows
from marl_core.config.prompt_template import columns_of, fill
from marl_core.config.run_config import DataSection
from marl_core.data.prompts import PromptData
from marl_core.testing import fake_rollout, tiny_tokenizer
from marl_plugins.reward_function import columns

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = {"role": "user", "content": "hi"}


def tokenizer(template: str | None = TEMPLATE) -> Any:
    """One that begins every text with BOS, as Llama's does."""
    words = tiny_tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    words.chat_template = template
    return words


def load(folder: Path, *rows: dict[str, Any], words: Any = None, **options: Any) -> PromptData:
    file = folder / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return PromptData.load(DataSection(prompts=str(file), **options), words or tokenizer(), 200)


def read(data: PromptData) -> list[str]:
    return [tokenizer().decode(list(tokens)) for tokens in data.tokens]


class TestTemplate:
    def test_columns_fill_it(self, tmp_path: Path) -> None:
        data = load(tmp_path, {"question": "1+1?", "n": 3}, prompt_template="{{Q}} {question} ({n})\nA:", chat=False)
        assert list(data.texts) == ["{Q} 1+1? (3)\nA:"]
        assert read(data) == ["<bos>{Q} 1+1? (3)\nA:"]
        assert data.rows[0]["question"] == "1+1?"  # rewards get the columns as they are

    def test_braces_and_formats_in_a_row_are_text(self) -> None:
        assert fill("{a}|{b c}|{d.e}", {"a": "{b c} {0!r}", "b c": "}", "d.e": "x"}) == "{b c} {0!r}|}|x"

    @pytest.mark.parametrize("wrong", ["{a", "a}", "{}", "{a!r}", "{a:>3}", "{a:{b}}", "no column", "{{a}}"])
    def test_what_is_no_template(self, wrong: str) -> None:
        with pytest.raises(ValueError, match="a literal brace doubled"):
            columns_of(wrong)
        with pytest.raises(ConfigError, match="prompt_template"):
            DataSection(prompts="p.jsonl", prompt_template=wrong)

    def test_a_missing_column_is_named_with_its_row_and_those_there_are(self, tmp_path: Path) -> None:
        with pytest.raises(
            DataError,
            match=r"lacks the column 'q' of data.prompt_template \(row 2\); row 2 has: x, y",
        ):
            load(tmp_path, {"q": "a"}, {"x": 1, "y": 2}, prompt_template="Q: {q}")

    @pytest.mark.parametrize("value", [None, ["a"], {"a": 1}, True])
    def test_what_is_neither_text_nor_number(self, tmp_path: Path, value: Any) -> None:
        with pytest.raises(
            DataError, match=r"row 1 of .* has (a .*|nothing \(null\)) as 'q'; a template takes texts and numbers"
        ):
            load(tmp_path, {"q": value}, prompt_template="Q: {q}")

    def test_a_row_of_blanks_is_empty(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"1 prompt of .* is empty \(row 1\)"):
            load(tmp_path, {"q": " "}, prompt_template="Q: {q}")

    def test_field_beside_it_would_be_ignored(self) -> None:
        with pytest.raises(ConfigError, match="field is never used with prompt_template"):
            DataSection(prompts="p.jsonl", field="text", prompt_template="{q}")


class TestChat:
    def test_texts_become_user_messages(self, tmp_path: Path) -> None:
        data = load(tmp_path, {"prompt": "hi"}, chat=True)
        assert data.texts[0] == [USER]
        assert read(data) == ["<bos><user>hi<assistant>"]  # one BOS: the template's

    def test_a_filled_template_with_a_system_prompt(self, tmp_path: Path) -> None:
        data = load(tmp_path, {"q": "1+1"}, prompt_template="Q: {q}", chat=True, system_prompt="Be brief.")
        assert data.texts[0] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Q: 1+1"},
        ]
        assert read(data) == ["<bos><system>Be brief.<user>Q: 1+1<assistant>"]

    def test_a_rows_own_system_message_stays(self, tmp_path: Path) -> None:
        own = [{"role": "system", "content": "own"}, USER]
        data = load(tmp_path, {"prompt": own}, {"prompt": [USER]}, system_prompt="ours")
        assert read(data) == ["<bos><system>own<user>hi<assistant>", "<bos><system>ours<user>hi<assistant>"]

    def test_a_begun_answer_is_gone_on_with(self, tmp_path: Path) -> None:
        data = load(tmp_path, {"prompt": [USER, {"role": "assistant", "content": "Well,"}]})
        assert read(data) == ["<bos><user>hi<assistant>Well,"]

    def test_a_system_prompt_needs_a_chat(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"data.system_prompt: row 1 of .* is a text.*Set data.chat: true"):
            load(tmp_path, {"prompt": "hi"}, system_prompt="s")

    def test_no_chat_template(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no chat template. Use plain texts .data.prompt_template"):
            load(tmp_path, {"prompt": "hi"}, chat=True, words=tokenizer(None))

    def test_what_the_template_refuses_is_said_with_its_row(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"can't render row 2 of .*p.jsonl \(roles: judge\): no such role"):
            load(tmp_path, {"prompt": [USER]}, {"prompt": [{"role": "judge", "content": "x"}]})


class TestControl:
    """A row may not write what only the config's author and the model's template may."""

    def test_a_template_with_control_tokens_is_meant(self, tmp_path: Path) -> None:
        data = load(tmp_path, {"q": "1+1"}, prompt_template="<bos>user {q}<eos>")
        assert read(data) == ["<bos>user 1+1<eos>"]  # and BOS is not there twice

    @pytest.mark.parametrize("options", [{}, {"chat": True}])
    @pytest.mark.parametrize("template", ["<eos> {q}", "{q}", "<{q}"])
    def test_a_row_with_one_is_refused(self, tmp_path: Path, template: str, options: dict[str, Any]) -> None:
        text = "eos>x" if template == "<{q}" else "a<eos>b"  # half of it in the template
        with pytest.raises(DataError, match=r"control tokens such as '<eos>' \(row 2\)"):
            load(tmp_path, {"q": "fine"}, {"q": text}, prompt_template=template, **options)

    @pytest.mark.parametrize(
        "message",
        [
            {"role": "user<eos>", "content": "hi"},
            {"role": "user", "content": "hi<eos>"},
            {"role": "user", "content": [{"type": "text", "text": "hi<eos>"}]},
            {"role": "user", "content": "hi", "name": "<eos>"},
        ],
    )
    @pytest.mark.parametrize("rule", ["error", "as-text"])
    def test_anywhere_in_a_message(self, tmp_path: Path, message: dict[str, Any], rule: str) -> None:
        """In a chat as-text is refused too: a chat template can't keep the two apart."""
        with pytest.raises(DataError, match="control tokens such as '<eos>'"):
            load(tmp_path, {"prompt": [message]}, on_control=rule)

    def test_the_systems_own_words_are_the_configs(self, tmp_path: Path) -> None:
        data = load(tmp_path, {"prompt": "hi"}, chat=True, system_prompt="a<eos>")
        assert read(data) == ["<bos><system>a<eos><user>hi<assistant>"]

    def test_a_bos_written_out_is_not_given_twice(self, tmp_path: Path) -> None:
        data = load(tmp_path, {"prompt": "<bos>hi"}, on_control="parse")
        assert read(data) == ["<bos>hi"]
        plain = load(tmp_path, {"prompt": "<bos>hi"}, on_control="as-text")
        assert read(plain) == ["<bos><bos>hi"]
        assert list(plain.tokens[0]).count(1) == 1  # the second is text


def test_rewards_get_messages_for_messages_and_texts_for_texts() -> None:
    """As TRL's GRPO calls its reward functions, row by row."""
    rollout = fake_rollout([("x", " one"), ("hi", " two")])
    prompts = type(rollout.prompts)(rollout.prompts.ids, rollout.prompts.mask, rollout.prompts.rows, ["x", [USER]])
    given = columns(type(rollout)(prompts, rollout.ids, rollout.mask, rollout.texts, rollout.finished))
    assert given["prompts"] == ["x", [USER]]
    assert given["completions"] == [" one", [{"role": "assistant", "content": " two"}]]


def test_a_data_set_by_name_with_subset_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def load_dataset(name: str, subset: str | None, **options: Any) -> list[dict[str, str]]:
        asked.update(options, name=name, subset=subset)
        return [{"prompt": "hi"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    part = DataSection(prompts="owner/sums", subset="main", split="test", revision="v1")
    assert list(PromptData.load(part, tokenizer(), 200).texts) == ["hi"]
    assert asked == {"name": "owner/sums", "subset": "main", "split": "test", "revision": "v1"}


def test_a_folder_loads_as_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums" / "train.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert [row["prompt"] for row in read_rows("sums")] == ["a", "b"]
    with pytest.raises(DataError, match=r"could not load it with split 'test'.*Check the name, data.split"):
        read_rows("sums", "test")


class TestSpelledOutInJson:
    """A CSV file, and many a parquet file, holds messages and tools as JSON texts."""

    @pytest.mark.parametrize("chat", [True, False])
    def test_messages(self, tmp_path: Path, chat: bool) -> None:
        data = load(tmp_path, {"prompt": json.dumps([USER])}, chat=chat)
        assert read(data) == ["<bos><user>hi<assistant>"]
        assert list(data.texts) == [[USER]]

    @pytest.mark.parametrize("text", ['["hi"]', "[1, 2]", "[", "[]", '{"role": "user", "content": "hi"}'])
    def test_other_texts_stay(self, tmp_path: Path, text: str) -> None:
        assert list(load(tmp_path, {"prompt": text}).texts) == [text]

    @pytest.mark.parametrize("column", [{"tools": [{"type": "function"}]}, {"chat_template_kwargs": '{"a": 1}'}])
    def test_what_only_chats_read_is_told_of_texts(self, tmp_path: Path, column: dict[str, Any]) -> None:
        with pytest.warns(MarlWarning, match="1 of 1 prompt .* only a chat's template reads"):
            load(tmp_path, {"prompt": "hi", **column})


@pytest.mark.parametrize(
    ("strip", "begun", "read_as"),
    [
        (" | trim", "Sum: ", "Sum: 4"),
        ("", "Sum: ", "Sum:  4"),
        (" | trim", "Sum:", "Sum: 4"),
        (" | trim", "a\n\n", "a 4"),
    ],
)
def test_an_answer_that_was_begun_reads_as_it_was_written(tmp_path: Path, strip: str, begun: str, read_as: str) -> None:
    """A template that strips its messages leaves the blank to the response: a judge reads one, as the model's tokens have it."""
    words = tokenizer(TEMPLATE.replace("m.content", f"m.content{strip}"))
    data = load(tmp_path, {"prompt": [USER, {"role": "assistant", "content": begun}]}, words=words)
    written = words.decode([*data.tokens[0], *words(" 4", add_special_tokens=False).input_ids])
    rollout = Rollout.from_responses(data.take([0]), [words(" 4", add_special_tokens=False).input_ids], words)
    (answer,) = columns(rollout)["completions"][0]
    assert answer["content"] == read_as
    assert written.endswith(f"<assistant>{read_as}")
