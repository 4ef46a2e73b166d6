"""Prompts from files: every format, what is refused and how it is said, and the order they are dealt in."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from marl_core import DataError
from marl_core.artifacts.rows import look_at_prompts, read_rows
from marl_core.config.run_config import DataSection
from marl_core.data.prompts import PromptData
from marl_core.testing import tiny_tokenizer

ROWS = [{"prompt": "A good", "label": 1}, {"prompt": "Bad", "label": 2}, {"prompt": "It was", "label": 3}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    file = folder / name
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif name.endswith(".csv"):
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows)) + "\n\n"
        file.write_text(text, encoding="utf-8")
    return str(file)


def load(source: str, room: int = 100, tokenizer: Any = None, **options: Any) -> PromptData:
    return PromptData.load(DataSection(prompts=source, **options), tokenizer or tiny_tokenizer(), room)


class TestFormats:
    @pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
    def test_each_gives_the_same_prompts(self, tmp_path: Path, suffix: str) -> None:
        data = load(write(tmp_path, f"p.{suffix}", ROWS))
        assert list(data.texts) == ["A good", "Bad", "It was"]
        assert [str(row["label"]) for row in data.rows] == ["1", "2", "3"]
        assert list(data.tokens[1]) == tiny_tokenizer()("Bad").input_ids

    def test_another_column(self, tmp_path: Path) -> None:
        assert list(load(write(tmp_path, "p.jsonl", [{"text": "hi"}]), field="text").texts) == ["hi"]

    def test_windows_line_ends_and_a_byte_order_mark(self, tmp_path: Path) -> None:
        for name, text in (
            ("p.jsonl", '{"prompt": "a"}\r\n{"prompt": "b"}\r\n'),
            ("p.csv", "prompt\r\na\r\nb\r\n"),
            ("p.json", '[{"prompt": "a"}, {"prompt": "b"}]'),
        ):
            file = tmp_path / name
            file.write_bytes(b"\xef\xbb\xbf" + text.encode())
            assert list(load(str(file)).texts) == ["a", "b"], name

    @pytest.mark.parametrize("content", ['{"prompt": "a"}\n{"prompt": "b"}\n', '[{"prompt": "a"}, {"prompt": "b"}]'])
    def test_json_lines_are_often_called_json(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "p.json").write_text(content, encoding="utf-8")
        assert list(load(str(tmp_path / "p.json")).texts) == ["a", "b"]

    def test_suffixes_in_capitals(self, tmp_path: Path) -> None:
        (tmp_path / "P.JSONL").write_text('{"prompt": "a"}\n', encoding="utf-8")
        assert list(load(str(tmp_path / "P.JSONL")).texts) == ["a"]

    def test_unicode_line_separators_are_text(self, tmp_path: Path) -> None:
        (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
        assert list(load(str(tmp_path / "p.jsonl")).texts) == ["a\u2028b"]

    def test_what_the_quick_look_accepts_can_be_read(self, tmp_path: Path) -> None:
        """`marl check` looks at a file without this reader: the two must not disagree."""
        for suffix in ("jsonl", "json", "csv"):
            for head in (b"", b"\xef\xbb\xbf"):
                file = tmp_path / f"p.{suffix}"
                file.write_bytes(head + Path(write(tmp_path, f"q.{suffix}", ROWS)).read_bytes())
                assert look_at_prompts(str(file), "prompt", "data.prompts") is None
                assert len(load(str(file))) == 3


class TestChat:
    messages = (
        [{"role": "user", "content": "hi"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "you"}],
    )

    def test_goes_through_the_models_template(self, tmp_path: Path) -> None:
        words = tiny_tokenizer()
        words.chat_template = TEMPLATE
        data = load(write(tmp_path, "p.jsonl", [{"prompt": m} for m in self.messages]), tokenizer=words)
        assert words.decode(list(data.tokens[0])) == "<user>hi<assistant>"
        assert words.decode(list(data.tokens[1])) == "<system>s<user>you<assistant>"
        assert data.texts[0] == self.messages[0]

    def test_without_a_template_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="tokenizer has no chat template"):
            load(write(tmp_path, "p.jsonl", [{"prompt": self.messages[0]}]))

    @pytest.mark.parametrize("wrong", [[], [{"role": "user"}], ["hi"], {"role": "user", "content": "x"}, 3, True])
    def test_anything_else_is_refused(self, tmp_path: Path, wrong: Any) -> None:
        with pytest.raises(DataError, match=r"row 2 of .* has an? .* as 'prompt'; a prompt is a text, or a list"):
            load(write(tmp_path, "p.jsonl", [{"prompt": "fine"}, {"prompt": wrong}]))


class TestRefused:
    @pytest.mark.parametrize("empty", ["", "   ", "\n", None])
    def test_empty_prompts_are_named_by_row(self, tmp_path: Path, empty: str | None) -> None:
        source = write(tmp_path, "p.jsonl", [*ROWS, {"prompt": empty}, {"prompt": empty}])
        with pytest.raises(
            DataError, match=r"2 prompts of .* are empty \(rows 4, 5\). Correct them, or set data.on_empty: drop"
        ):
            load(source)
        assert len(load(source, on_empty="drop")) == 3

    def test_over_long_prompts(self, tmp_path: Path) -> None:
        source = write(tmp_path, "p.jsonl", ROWS)  # 6, 3 and 6 tokens
        with pytest.raises(DataError, match=r"2 prompts of .* exceed 5 tokens \(rows 1, 3\)"):
            load(source, max_prompt_tokens=5)
        assert list(load(source, max_prompt_tokens=5, on_long="drop").texts) == ["Bad"]
        cut = load(source, max_prompt_tokens=5, on_long="truncate-left")
        assert [len(tokens) for tokens in cut.tokens] == [5, 3, 5]
        assert tiny_tokenizer().decode(list(cut.tokens[0])) == " good"

    def test_the_models_own_room_is_a_limit_too(self, tmp_path: Path) -> None:
        source = write(tmp_path, "p.jsonl", ROWS)
        with pytest.raises(DataError, match="exceed 4 tokens"):
            load(source, room=4)
        with pytest.raises(DataError, match="exceed 4 tokens"):
            load(source, room=4, max_prompt_tokens=50)

    def test_nothing_left(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="holds no usable prompt"):
            load(write(tmp_path, "p.jsonl", [{"prompt": " "}]), on_empty="drop")

    def test_a_missing_column_is_named_with_those_there_are(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"3 of 3 rows .* lack the column 'text' .*; row 1 has: prompt, label"):
            load(write(tmp_path, "p.jsonl", ROWS), field="text")

    def test_bad_json_is_named_by_line(self, tmp_path: Path) -> None:
        (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": \n', encoding="utf-8")
        with pytest.raises(DataError, match="line 3 is not JSON"):
            load(str(tmp_path / "p.jsonl"))

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("p.jsonl", b"", "holds no rows"),
            ("p.jsonl", b"3\n", "row 1 of .* is a int"),
            ("p.csv", b"prompt,label\na,b\nc,d,e\n", "row 2 has more cells than the header"),
            ("p.json", b"[]", "holds no rows"),
            ("p.json", b"{", "can't be read: line 1 is not JSON"),
            ("p.json", b'"text"', "holds a str, not a list of rows"),
            ("p.jsonl", b'{"prompt": "\xff"}\n', "is not UTF-8 text"),
            ("p.parquet", b"nonsense", "can't be read"),
        ],
    )
    def test_damaged_files(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            load(str(tmp_path / name))

    def test_a_missing_file_and_an_unknown_data_set(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="there is no file"):
            read_rows(str(tmp_path / "none.jsonl"))
        with pytest.raises(
            DataError, match=r"is no .json, .jsonl, .csv or .parquet file, and datasets could not load it"
        ):
            read_rows(str(tmp_path / "none"))


class TestOrder:
    data = PromptData([{"n": n} for n in range(10)], [str(n) for n in range(10)], [[4 + n] for n in range(10)], 0)

    def dealt(self, steps: range, count: int, seed: int = 0, shuffle: bool = True) -> list[int]:
        return [row["n"] for step in steps for row in self.data.batch(step, count, seed, shuffle).rows]

    @pytest.mark.parametrize("count", [1, 3, 4, 10, 15])
    def test_every_epoch_is_covered_exactly(self, count: int) -> None:
        order = self.dealt(range(30 // count), count)
        for epoch in range(len(order) // 10):
            assert sorted(order[10 * epoch : 10 * epoch + 10]) == list(range(10))

    def test_each_epoch_in_a_new_order_from_the_seed(self) -> None:
        first, second = self.dealt(range(1), 10), self.dealt(range(1, 2), 10)
        assert first != second
        assert first != list(range(10))
        assert first == self.dealt(range(1), 10)
        assert first != self.dealt(range(1), 10, seed=1)

    def test_any_step_can_be_had_at_once(self) -> None:
        """Resume asks for step k without the steps before it."""
        assert self.dealt(range(5, 6), 4) == self.dealt(range(6), 4)[20:24]

    def test_without_shuffling_in_the_files_order(self) -> None:
        assert self.dealt(range(3), 4, shuffle=False) == [*range(10), 0, 1]

    def test_a_batch_larger_than_the_data_repeats_prompts_evenly(self) -> None:
        assert set(Counter(self.dealt(range(1), 20)).values()) == {2}

    def test_batches_are_left_padded(self) -> None:
        data = PromptData([{}, {}], ["a", "b"], [[5], [6, 7]], 0)
        prompts = data.take([0, 1])
        assert prompts.ids.tolist() == [[0, 5], [6, 7]]
        assert prompts.mask.tolist() == [[False, True], [True, True]]
