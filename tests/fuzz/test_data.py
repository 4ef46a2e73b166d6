"""Whatever stands in a data file, an adapter or a checkpoint: it is read, or refused with a MarlError that names it."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marl_core import AdapterBank, DataError, MarlError, RunConfig, Runner
from marl_core.artifacts.rows import look_at_prompts
from marl_core.config.run_config import DataSection
from marl_core.data.prompts import PromptData
from marl_core.testing import tiny_bank, tiny_tokenizer

MakeConfig = Callable[..., RunConfig]
Write = Callable[..., str]
TOKENIZER = tiny_tokenizer()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
TEXTS = st.text() | st.sampled_from(
    ["", " ", "\0", "a\0b", "\ud800", "a\udfffb", "\u2028", "\ufeff", "<eos>", "<pad><bos>", "\r\n"]
)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(["prompt", "label", "", "Prompt"]), TEXTS | JSON, max_size=3) | JSON, max_size=4
)


def load(file: Path, **options: Any) -> PromptData | None:
    """The prompts, or None when they were refused with a MarlError; nothing else may be raised."""
    part = DataSection(prompts=str(file), on_empty="drop", on_long="drop", **options)
    quick = look_at_prompts(str(file), part.field, "data.prompts")
    try:
        data = PromptData.load(part, TOKENIZER, 64)
    except MarlError:
        return None
    assert quick is None  # what the quick look refuses can't be read either
    for tokens, text in zip(data.tokens, data.texts, strict=True):
        assert 0 < len(tokens) <= 64
        assert max(tokens) < len(TOKENIZER)
        json.dumps(text, ensure_ascii=False).encode()  # it will be written to samples.jsonl
    return data


@settings(max_examples=150)
@given(suffix=st.sampled_from([".json", ".jsonl", ".csv", ".parquet"]), content=st.binary(max_size=120))
def test_any_bytes(tmp_path: Path, suffix: str, content: bytes) -> None:
    file = tmp_path / f"prompts{suffix}"
    file.write_bytes(content)
    load(file)


@settings(max_examples=150)
@given(rows=ROWS, suffix=st.sampled_from([".json", ".jsonl"]))
def test_any_rows(tmp_path: Path, rows: list[Any], suffix: str) -> None:
    file = tmp_path / f"prompts{suffix}"
    file.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)), encoding="utf-8")
    load(file)


@settings(max_examples=60)
@given(rows=st.lists(st.lists(st.text(st.characters(codec="utf-8"), max_size=10), max_size=4), max_size=5))
def test_any_table(tmp_path: Path, rows: list[list[str]]) -> None:
    out = io.StringIO()
    csv.writer(out).writerows([["prompt", "label"], *rows])
    file = tmp_path / "prompts.csv"
    file.write_text(out.getvalue(), encoding="utf-8")
    load(file)


class TestNastyPrompts:
    def write(self, folder: Path, *prompts: Any) -> Path:
        file = folder / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
        return file

    def test_nul_bytes_are_text(self, tmp_path: Path) -> None:
        data = load(self.write(tmp_path, "a\0b"))
        assert data is not None
        assert TOKENIZER.decode(list(data.tokens[0])) == "a\0b"

    def test_lone_surrogates_are_named_by_row(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"row 2 of .* half of a surrogate pair"):
            PromptData.load(DataSection(prompts=str(self.write(tmp_path, "fine", "a\ud800"))), TOKENIZER, 64)
        chat = [{"role": "user", "content": "\udc00"}]
        with pytest.raises(DataError, match=r"row 1 of .* half of a surrogate pair"):
            PromptData.load(DataSection(prompts=str(self.write(tmp_path, chat))), TOKENIZER, 64)

    def test_a_megabyte_in_one_line_is_too_long_and_no_more(self, tmp_path: Path) -> None:
        file = self.write(tmp_path, "fine", "x" * 1_000_000)
        with pytest.raises(DataError, match=r"exceeds 64 tokens \(row 2\)"):
            PromptData.load(DataSection(prompts=str(file)), TOKENIZER, 64)
        data = load(file)
        assert data is not None
        assert len(data) == 1

    def test_control_tokens_in_a_text_are_refused_by_row(self, tmp_path: Path) -> None:
        file = self.write(tmp_path, "fine", "so<eos>it ends")
        with pytest.raises(DataError, match=r"holds control tokens such as '<eos>' \(row 2\).*data.on_control: parse"):
            PromptData.load(DataSection(prompts=str(file)), TOKENIZER, 64)
        parsed = PromptData.load(DataSection(prompts=str(file), on_control="parse"), TOKENIZER, 64)
        assert TOKENIZER.eos_token_id in parsed.tokens[1]
        plain = PromptData.load(DataSection(prompts=str(file), on_control="as-text"), TOKENIZER, 64)
        assert TOKENIZER.eos_token_id not in plain.tokens[1]
        assert TOKENIZER.decode(list(plain.tokens[1])) == "so<eos>it ends"
        dropped = PromptData.load(DataSection(prompts=str(file), on_control="drop"), TOKENIZER, 64)
        assert len(dropped) == 1

    def test_control_tokens_in_a_message_are_refused_too(self, tmp_path: Path) -> None:
        words = tiny_tokenizer()
        words.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
        file = self.write(tmp_path, [{"role": "user", "content": "ignore<bos> that"}])
        with pytest.raises(DataError, match="control tokens such as '<bos>'"):
            PromptData.load(DataSection(prompts=str(file)), words, 64)
        fine = self.write(tmp_path, [{"role": "user", "content": "fine"}])  # the template's own are no intruders
        assert len(PromptData.load(DataSection(prompts=str(fine)), words, 64)) == 1


@pytest.fixture(scope="module")
def bank() -> AdapterBank:
    return tiny_bank()


@settings(max_examples=60)
@given(
    key=st.sampled_from(
        [
            "r",
            "lora_alpha",
            "target_modules",
            "peft_type",
            "task_type",
            "bias",
            "lora_dropout",
            "use_dora",
            "use_rslora",
            "init_lora_weights",
            "layers_to_transform",
            "layers_pattern",
            "rank_pattern",
            "alpha_pattern",
            "base_model_name_or_path",
            "modules_to_save",
            "auto_mapping",
            "revision",
            "inference_mode",
            "fan_in_fan_out",
            "layer_replication",
            "trainable_token_indices",
            "megatron_config",
            "made_up",
        ]
    ),
    value=JSON
    | st.sampled_from(
        [2**70, -1, 0, "LORA", "lora", "all", "all-linear", ["q_proj"], [[]], {"q_proj": 2}, "(", "owner/model", "~x/y"]
    ),
)
def test_any_adapter_config(bank: AdapterBank, sft_adapter: str, tmp_path: Path, key: str, value: Any) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(sft_adapter, folder, dirs_exist_ok=True)
    config = json.loads((Path(sft_adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, key: value}), encoding="utf-8")
    loads_or_refuses(bank, folder)


@settings(max_examples=60)
@given(
    content=st.binary(max_size=100), where=st.floats(0, 1), how=st.sampled_from(["replace", "cut", "flip", "insert"])
)
def test_any_adapter_weights(
    bank: AdapterBank, sft_adapter: str, tmp_path: Path, content: bytes, where: float, how: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(sft_adapter, folder, dirs_exist_ok=True)
    file = folder / "adapter_model.safetensors"
    whole = (Path(sft_adapter) / file.name).read_bytes()
    at = int(where * min(len(whole) - 1, 3000 if how == "flip" else len(whole)))  # flips: in the header, where it hurts
    spoiled = {
        "replace": content,
        "cut": whole[:at],
        "flip": whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :],
        "insert": whole[:at] + content + whole[at:],
    }
    file.write_bytes(spoiled[how])
    loads_or_refuses(bank, folder)


def loads_or_refuses(bank: AdapterBank, folder: Path) -> None:
    before = bank.adapters
    try:
        bank.load("odd", folder, trainable=True)
    except MarlError:
        assert bank.adapters == before
    else:
        bank.remove("odd")


@pytest.fixture(scope="module")
def finished(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run of two steps with two checkpoints, and its config."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = make_config(
        run={"folder": str(folder), "checkpoint_every": 1}, ppo={"steps": 2}, observers=["json-lines"], value="policy"
    )
    Runner(config).train()
    shutil.copytree(folder, folder.with_name("good"))
    return config, folder


@settings(max_examples=12)
@given(data=st.data())
def test_any_damage_to_a_run_folder(finished: tuple[RunConfig, Path], data: st.DataObject) -> None:
    """Resume goes on from a whole checkpoint, or says why not; a spoiled tensor is never loaded."""
    config, folder = finished
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("good"), folder)
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".json", ".jsonl", ".safetensors", ".yaml")
    )
    for file in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=3, unique=True)):
        content = file.read_bytes()
        how = data.draw(st.sampled_from(["missing", "cut", "flip", "empty", "folder", "pickle", "json"]))
        if how in ("missing", "folder"):
            file.unlink()
        if how == "folder":
            file.mkdir()
        at = data.draw(st.integers(0, len(content) - 1))
        new = {
            "cut": content[:at],
            "flip": content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :],
            "empty": b"",
            "pickle": b"\x80\x04]\x94.",
            "json": b'{"step": {}}',
        }
        if how in new:
            file.write_bytes(new[how])
    try:
        resumed = Runner(config, resume=True)
    except MarlError:
        return
    assert resumed.done in (0, 1, 2)
