"""Prompts files and model folders, looked at without heavy libraries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from marl_core import DataError, read_adapter
from marl_core.artifacts.hub import is_repo_name
from marl_core.artifacts.model_files import read_model
from marl_core.artifacts.rows import look_at_prompts


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": "y"}\n', None),
        ("a.jsonl", '\ufeff{"prompt": "x"}\r\n', None),
        ("a.json", '[{"prompt": "x"}]', None),
        ("a.json", '{"prompt": "x"}\n{"prompt": "y"}\n', None),
        ("a.json", '{"data": [1]}', "holds a dict, not a list of rows"),
        ("a.csv", "prompt,label\na,b\nc,d,e\n", "row 2 has more cells than the header"),
        ("a.jsonl", "[" * 100_000, "can't be read"),
        ("a.csv", "prompt,label\nx,1\n", None),
        ("a.parquet", "PAR1", None),
        ("a.jsonl", "", "holds no rows"),
        ("a.jsonl", "\n\n", "holds no rows"),
        ("a.json", "[]", "holds no rows"),
        ("a.csv", "prompt\n", "holds no rows"),
        (
            "a.jsonl",
            '{"promt": 1}\n{"promt": 1}\n',
            "row 1 of .* has no column 'prompt'. Set data.field to one of: promt. Did you mean 'promt'?",
        ),
        ("a.jsonl", '{"prompt": 1}\n{"promt": 1}\n', None),  # told with the faults of other rows
        ("a.csv", "text,label\nx,1\n", "has no column 'prompt'. Set data.field to one of: text, label"),
        ("a.jsonl", "[1]\n", "row 1 of .* is a list, not a set of columns"),
        ("a.jsonl", "{\n", "line 1 is not JSON"),
        ("a.txt", "hello", "of no known kind. Give a .json, .jsonl, .csv or .parquet file"),
    ],
)
def test_first_rows(tmp_path: Path, name: str, content: str, sentence: str | None) -> None:
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    error = look_at_prompts(str(file), "prompt", "data.prompts")
    if sentence is None:
        assert error is None
    else:
        with pytest.raises(DataError, match=f"^data.prompts: .*{sentence}"):
            raise error or AssertionError


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in str(look_at_prompts(str(tmp_path / "a.csv"), "prompt", "data.prompts"))


def test_missing_files_get_a_near_match_and_data_set_names_pass(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("{}")
    assert "Did you mean" in str(look_at_prompts(str(tmp_path / "promts.jsonl"), "prompt", "data.prompts"))
    assert "There is no folder" in str(look_at_prompts(str(tmp_path / "x" / "p.csv"), "prompt", "data.prompts"))
    assert look_at_prompts("owner/data-set", "prompt", "data.prompts") is None
    assert "there is no file" in str(look_at_prompts("./nothing", "prompt", "data.prompts"))


@pytest.mark.parametrize(
    ("path", "is_hub"),
    [
        ("gpt2", True),
        ("owner/name-1.5B", True),
        ("./x", False),
        ("/x", False),
        ("~/x", False),
        ("a/b/c", False),
        ("", False),
        ("a b", False),
        ("a--b", False),
    ],
)
def test_hub_names(path: str, is_hub: bool) -> None:
    assert is_repo_name(path, owner=False) == is_hub


def test_a_model_in_several_files(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "part-1.safetensors")
    index = {"weight_map": {"model.norm.weight": "part-1.safetensors", "lm_head.weight": "part-1.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = read_model(str(model_folder))
    assert found is not None
    assert len(found.shapes()) == 5


def test_adapter_files(adapter_folder: Path) -> None:
    files = read_adapter(adapter_folder, "x")
    assert sorted(files.shapes.values()) == [(2, 4), (4, 2)]
    assert files.score_keys == []
    assert files.base_name is None
    (adapter_folder / "adapter_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"x: .* holds a list"):
        read_adapter(adapter_folder, "x")
    (adapter_folder / "adapter_config.json").unlink()
    with pytest.raises(DataError, match=r"holds no adapter_config\.json"):
        read_adapter(adapter_folder, "x")
