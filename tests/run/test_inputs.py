"""Whatever a run reads by path is known by content: resume sees what changed, names the file, and takes an override."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from marl_core import ConfigError, RunConfig, Runner
from marl_core.bank.identity.fingerprint import fingerprint
from marl_core.store.input_files import named
from marl_core.store.provenance import changes, provenance

MakeConfig = Callable[..., RunConfig]
ODD = "def odd(completion_ids, **columns):\n    return [sum(ids) % 7 for ids in completion_ids]\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: str, prompts_file: str) -> Iterator[Path]:
    """Everything a run may name, in the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("reward.py", "judge.py"):
        (tmp_path / name).write_text(ODD, encoding="utf-8")
    for name in ("prompts.jsonl", "heldout.jsonl"):
        shutil.copy(prompts_file, tmp_path / name)
    shutil.copytree(tiny_folder, tmp_path / "base")
    package = tmp_path / "site" / "acme_words"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "score.py").write_text(ODD, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("acme_words")]:
        del sys.modules[name]


def config(make_config: MakeConfig, home: Path, **changes: Any) -> RunConfig:
    written: dict[str, Any] = {
        "model": {"path": str(home / "base")},
        "reward": [
            {"use": "function", "target": "~/reward.py:odd", "name": "file"},
            {"use": "function", "target": "acme_words.score:odd", "name": "module"},
        ],
        "data": {"prompts": "~/prompts.jsonl"},
        "eval": {
            "prompts": "~/heldout.jsonl",
            "limit": 2,
            "judges": {"judge": {"use": "function", "target": "~/judge.py:odd"}},
        },
        "run": {"folder": str(home / "run")},
        "ppo": {"steps": 1},
    }
    return make_config(**{**written, **changes})


def grow(file: Path, text: str) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(text)


def settle(file: Path) -> None:
    """The base's own settings, changed as a hand might."""
    found = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**found, "note": "by hand"}), encoding="utf-8")


SERIOUS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a reward's file": (lambda home: grow(home / "reward.py", "\n# other\n"), r"file ~/reward\.py:odd"),
    "a reward's module": (
        lambda home: grow(home / "site/acme_words/score.py", "\n# other\n"),
        r"file acme_words\.score:odd",
    ),
    "the prompts": (lambda home: grow(home / "prompts.jsonl", '{"prompt": "one more"}\n'), r"data ~/prompts\.jsonl"),
    "the tokenizer": (lambda home: settle(home / "base/tokenizer_config.json"), r"file .*/base \(tokenizer"),
}


@pytest.mark.parametrize("what", SERIOUS)
def test_what_decides_a_step_is_refused_by_name_unless_overridden(
    make_config: MakeConfig, home: Path, what: str
) -> None:
    Runner(config(make_config, home)).train()
    change, said = SERIOUS[what]
    change(home)
    with pytest.raises(ConfigError, match=rf"changed since the run was started: {said}.*override=True") as caught:
        Runner(config(make_config, home), resume=True)
    assert "," not in str(caught.value).split("Put back")[0]  # and nothing else is named
    runner = Runner(config(make_config, home), resume=True, override=True)
    assert runner.folder is not None
    assert any("(override=True): " in note and "changed since" in note for note in runner.folder.notes)
    runner.train()
    again = Runner(config(make_config, home), resume=True)  # the run goes on with it from here
    assert again.folder is not None
    assert not [note for note in again.folder.notes if "changed" in note]


@pytest.mark.parametrize(
    ("name", "shown", "text"),
    [("judge.py", "~/judge.py:odd", "\n# other\n"), ("heldout.jsonl", "~/heldout.jsonl", '{"prompt": "x"}\n')],
)
def test_what_evaluations_read_is_told(make_config: MakeConfig, home: Path, name: str, shown: str, text: str) -> None:
    """As the key `eval` may change on resume, so may its files; but not in silence."""
    Runner(config(make_config, home)).train()
    grow(home / name, text)
    runner = Runner(config(make_config, home), resume=True)
    assert runner.folder is not None
    told = [note for note in runner.folder.notes if "changed since" in note]
    assert told == [
        f"changed since the run was started: {shown}, read by evaluations: those before and after don't compare"
    ]


@pytest.mark.parametrize(
    "older",
    [
        lambda found: [found.pop(key) for key in ("files", "eval_files")],
        lambda found: found["base"].update(fingerprint="v99-0123456789abcdef", fingerprint_form="of a later version"),
        lambda found: found["base"].update(fingerprint=None, fingerprint_form=None),
    ],
)
def test_what_an_older_version_did_not_write_is_not_missed(
    make_config: MakeConfig, home: Path, older: Callable[[dict[str, Any]], object]
) -> None:
    Runner(config(make_config, home)).train()
    file = home / "run" / "provenance.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    older(found)
    file.write_text(json.dumps(found), encoding="utf-8")
    runner = Runner(config(make_config, home), resume=True)
    assert runner.folder is not None
    assert runner.folder.notes == ["resumed from step-000001"]


def recorded(runner: Runner) -> dict[str, Any]:
    """What this run would write into provenance.json."""
    assert runner.data is not None
    return provenance(runner.plan, runner.bank, runner.ranks.size, runner.data.rows, None)


def test_another_base_is_still_seen(make_config: MakeConfig, home: Path) -> None:
    runner = Runner(config(make_config, home))
    was = recorded(runner)
    assert runner.bank.fingerprint is not None
    with torch.no_grad():
        runner.bank.base.get_parameter("model.norm.weight").add_(1.0)
    other = fingerprint(runner.bank.base)
    assert changes(was, recorded(runner), runner.bank.fingerprint) == ([], [])
    assert changes(was, recorded(runner), other) == (["the base's weights"], [])


class TestNamed:
    """Which texts among a strategy's options name something on this machine."""

    def test_files_targets_and_folders_at_any_depth(self, home: Path, sft_adapter: str) -> None:
        value = {
            "target": "~/reward.py:odd",
            "module": "acme_words.score:odd",
            "deep": [{"words": str(home / "judge.py")}, ("~/base", sft_adapter)],
            "path": home / "prompts.jsonl",
        }
        assert set(named(value)) == {
            "~/reward.py:odd",
            "acme_words.score:odd",
            str(home / "judge.py"),
            "~/base",
            sft_adapter,
            str(home / "prompts.jsonl"),
        }
        assert "acme_words" not in sys.modules  # nothing is imported

    @pytest.mark.parametrize(
        "text",
        ["", "chat", "\n", "http://127.0.0.1:80/score", "owner/name", "no.such.module:f", "reward.py:odd", "a\0b", ".",
         "~", "~/run", "os.path", ":f", "..:f", "no_such:f", "x" * 5000],
    )  # fmt: skip
    def test_other_texts_name_nothing(self, home: Path, text: str) -> None:
        assert named([text, {"a": (text,)}, 3, None]) == {}

    def test_a_folder_is_known_by_what_it_computes(self, home: Path) -> None:
        base = home / "base"
        before = named(str(base))
        for name in ("README.md", "trainer_state.json", "marl_certificate.json", ".cache.json", "optimizer.pt"):
            (base / name).write_text("words", encoding="utf-8")
        assert named(str(base)) == before
        (weights,) = base.glob("*.safetensors")
        with weights.open("r+b") as stream:
            stream.seek(-3, os.SEEK_END)
            stream.write(b"\x01\x02\x03")
        assert named(str(base)) != before

    def test_of_a_large_file_some_blocks_are_read(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from marl_core.store import input_files

        monkeypatch.setattr(input_files, "MAX_WHOLE_FILE_BYTES", 10)
        monkeypatch.setattr(input_files, "BLOCK_BYTES", 4)
        monkeypatch.setattr(input_files, "BLOCK_COUNT", 4)
        file = home / "base" / "model.safetensors"
        seen = set()
        for place in (None, 0, 33, 66, 99):
            content = bytearray(100)
            if place is not None:
                content[place] = 1
            file.write_bytes(bytes(content))
            seen.add(named(str(home / "base"))[str(home / "base")])
        assert len(seen) == 5
