"""Checkpoints: bit for bit, whole or not at all, and damage is seen and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from marl_core import AdapterBank, DataError, NumericError
from marl_core.ppo.roles import TrainableRoles
from marl_core.ppo.scoring import forward
from marl_core.ppo.shaping import RewardStats
from marl_core.store import checkpoint, files
from marl_core.store.run_state import RunState
from marl_core.testing import fake_rollout, tiny_bank
from marl_core.testing.kinds import make_config

TRAINED = TrainableRoles("policy", "value-head", "value")


def make(seed: int = 0, steps: int = 2) -> tuple[AdapterBank, torch.optim.AdamW]:
    """A bank with policy, value adapter and head, and an optimizer that has done some steps."""
    bank = tiny_bank()
    for name in ("policy", "value"):
        bank.add(name, make_config(2, 4, ["q_proj", "v_proj"], 0.0, {}, bank.linears), seed=seed)
    bank.add_value_head("value-head")
    optimizer = torch.optim.AdamW([p for found in TRAINED.parameters(bank).values() for p in found.values()], lr=0.05)
    for _ in range(steps):
        for name in ("policy", "value"):
            with bank.using(name, train=True):
                passed = forward(bank, fake_rollout(), 1.0, value_head="value-head")
                assert passed.values is not None
                loss = passed.logprobs.sum() + (passed.values - 1).square().sum()
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return bank, optimizer


def numbers(bank: AdapterBank, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All weights and all optimizer state."""
    weights = {f"{role}/{name}": p for role, found in TRAINED.parameters(bank).items() for name, p in found.items()}
    states = {
        f"{name}|{key}": value for name, p in weights.items() for key, value in optimizer.state.get(p, {}).items()
    }
    return {name: tensor.detach().clone() for name, tensor in {**weights, **states}.items()}


def save(folder: Path, step: int = 1, keep: int = 2) -> tuple[AdapterBank, torch.optim.AdamW, Path]:
    bank, optimizer = make(steps=step)
    path = checkpoint.save(folder, bank, TRAINED, optimizer, RunState(step, 0.1, RewardStats(3.0, 0.5, 2.0)), keep)
    return bank, optimizer, path


class TestRoundTrip:
    def test_is_bitwise(self, tmp_path: Path) -> None:
        bank, optimizer, path = save(tmp_path, 2)
        expected = numbers(bank, optimizer)
        other, other_optimizer = make(seed=5, steps=0)
        state = checkpoint.load(path, other, TRAINED, other_optimizer)
        assert state == RunState(2, 0.1, RewardStats(3.0, 0.5, 2.0))
        found = numbers(other, other_optimizer)
        assert found.keys() == expected.keys()
        assert sum("|exp_avg" in name for name in found) > 10
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert all(found[name].dtype == expected[name].dtype for name in found)

    def test_training_goes_on_bitwise(self, tmp_path: Path) -> None:
        _, _, path = save(tmp_path, 2)
        resumed, optimizer = make(seed=5, steps=0)
        checkpoint.load(path, resumed, TRAINED, optimizer)
        whole, whole_optimizer = make(steps=3)
        for name in ("policy", "value"):
            with resumed.using(name, train=True):
                passed = forward(resumed, fake_rollout(), 1.0, value_head="value-head")
                assert passed.values is not None
                (passed.logprobs.sum() + (passed.values - 1).square().sum()).backward()
        optimizer.step()
        expected, found = numbers(whole, whole_optimizer), numbers(resumed, optimizer)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_no_pickle_and_a_plain_adapter(self, tmp_path: Path) -> None:
        _, _, path = save(tmp_path)
        assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".safetensors", ".json"}
        assert (path / "policy" / "adapter_config.json").is_file()
        assert (path / "value" / "adapter_model.safetensors").is_file()

    def test_only_the_newest_are_kept(self, tmp_path: Path) -> None:
        for step in (1, 2, 3):
            save(tmp_path, step)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
        save(tmp_path, 4, keep=1)
        assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]


class TestKept:
    """Retention and choice go by the step's number; what is being written is never dropped."""

    def names(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir())

    @pytest.mark.parametrize("keep", [1, 2, 3])
    def test_the_one_just_written_stays_whatever_is_newer(self, tmp_path: Path, keep: int) -> None:
        for step in (10, 20):
            save(tmp_path, step, keep=5)
        truncate(tmp_path / "step-000020")
        path = save(tmp_path, 15, keep=keep)[2]
        assert checkpoint.damage(path) is None
        assert checkpoint.newest(tmp_path)[0] == path
        assert ("step-000010" in self.names(tmp_path)) == (keep > 1)

    def test_later_ones_are_set_aside_and_come_back_as_nothing(self, tmp_path: Path) -> None:
        for step in (1, 2, 3):
            save(tmp_path, step, keep=5)
        assert [path.name for path in checkpoint.set_aside(tmp_path, 1)] == [
            "damaged-step-000002",
            "damaged-step-000003",
        ]
        save(tmp_path, 3, keep=5)
        assert [path.name for path in checkpoint.saved(tmp_path)] == ["step-000001", "step-000003"]
        checkpoint.set_aside(tmp_path, 1)  # what was set aside before makes room
        assert self.names(tmp_path) == ["damaged-step-000002", "damaged-step-000003", "step-000001"]

    def test_a_million_steps_sort_by_number(self, tmp_path: Path) -> None:
        for step in (999_999, 1_000_000):
            for_now = tmp_path / checkpoint.name_of(step)
            save(tmp_path, 1)[2].rename(for_now)
        assert checkpoint.newest(tmp_path)[0].name == "step-1000000"
        assert [checkpoint.step_of(path) for path in checkpoint.saved(tmp_path)] == [999_999, 1_000_000]

    def test_other_names_are_no_checkpoints(self, tmp_path: Path) -> None:
        save(tmp_path, 1)
        for name in ("step-old", "step-000009.bak", "step-"):
            (tmp_path / name).mkdir()
        (tmp_path / "step-000007").touch()
        assert [path.name for path in checkpoint.saved(tmp_path)] == ["step-000001"]


def truncate(path: Path) -> None:
    file = path / "policy" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    file = path / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))


def change_a_number(path: Path) -> None:
    file = path / "state.json"
    file.write_text(file.read_text(encoding="utf-8").replace("0.1", "0.2"), encoding="utf-8")


def another_format(path: Path) -> None:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    (path / "state.json").write_text(json.dumps({**state, "format": 99}), encoding="utf-8")
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest["state.json"] = files.sha256(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def empty(path: Path) -> None:
    for file in path.rglob("*"):
        if file.is_file():
            file.unlink()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"policy/adapter_model.safetensors: hash differs"),
    "flipped bit": (flip_a_bit, "optimizer.safetensors: hash differs"),
    "changed number": (change_a_number, "state.json: hash differs"),
    "missing file": (lambda path: (path / "heads.safetensors").unlink(), "heads.safetensors is missing"),
    "missing manifest": (lambda path: (path / "manifest.json").unlink(), "manifest or state can't be read"),
    "manifest cut off": (lambda path: (path / "manifest.json").write_text("{"), "manifest or state can't be read"),
    "manifest of another kind": (
        lambda path: (path / "manifest.json").write_text("[]"),
        "manifest or state can't be read",
    ),
    "another format": (another_format, "state.json is of another format"),
    "empty folder": (empty, "can't be read"),
}


class TestDamage:
    def test_a_whole_one_has_none(self, tmp_path: Path) -> None:
        assert checkpoint.damage(save(tmp_path)[2]) is None

    @pytest.mark.parametrize("what", DAMAGE)
    def test_is_seen_and_the_one_before_is_used(self, tmp_path: Path, what: str) -> None:
        _, _, first = save(tmp_path, 1)
        _, _, second = save(tmp_path, 2)
        spoil, message = DAMAGE[what]
        spoil(second)
        found, notes = checkpoint.newest(tmp_path)
        assert found == first
        assert len(notes) == 1
        assert notes[0].startswith("step-000002 is damaged (")
        assert message.replace("\\", "") in notes[0]

    def test_none_whole_is_an_error_that_names_each(self, tmp_path: Path) -> None:
        for step in (1, 2):
            truncate(save(tmp_path, step)[2])
        with pytest.raises(DataError, match=r"no whole checkpoint: step-000002 is damaged .*; step-000001 is damaged"):
            checkpoint.newest(tmp_path)

    def test_none_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="there is no checkpoint in it"):
            checkpoint.newest(tmp_path)

    def test_of_another_config(self, tmp_path: Path) -> None:
        path = save(tmp_path)[2]
        bank = tiny_bank()
        for name in ("policy", "value"):
            bank.add(name, make_config(8, 4, ["q_proj", "v_proj"], 0.0, {}, bank.linears), seed=0)
        bank.add_value_head("value-head")
        optimizer = torch.optim.AdamW([p for found in TRAINED.parameters(bank).values() for p in found.values()])
        with pytest.raises(DataError, match=r"doesn't fit this config .*\[2, 32\], here \[8, 32\]"):
            checkpoint.load(path, bank, TRAINED, optimizer)


class TestCrash:
    @pytest.mark.parametrize("call", ["save_file", "write_json", "sha256"])
    def test_inside_save_leaves_the_old_ones_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        first = save(tmp_path, 1)[2]

        def crash(*_: Any, **__: Any) -> None:
            raise NumericError("the power went")

        monkeypatch.setattr(checkpoint, call, crash)
        with pytest.raises(NumericError):
            save(tmp_path, 2)
        monkeypatch.undo()
        assert list(tmp_path.iterdir()) == [first]
        assert checkpoint.newest(tmp_path) == (first, [])

    def test_what_a_killed_save_left_behind_does_not_matter(self, tmp_path: Path) -> None:
        first = save(tmp_path, 1)[2]
        (tmp_path / ".step-000002.tmp" / "policy").mkdir(parents=True)
        assert checkpoint.newest(tmp_path) == (first, [])
        second = save(tmp_path, 2)[2]
        assert checkpoint.newest(tmp_path) == (second, [])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


class TestFiles:
    def test_writing_is_all_or_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "a.json"
        files.write_json(file, {"n": 1})

        def crash(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", crash)
        with pytest.raises(OSError, match="No space left"):
            files.write_json(file, {"n": 2})
        assert json.loads(file.read_text(encoding="utf-8")) == {"n": 1}

    def test_lines_after_a_step_are_dropped_and_a_half_line_with_them(self, tmp_path: Path) -> None:
        file = tmp_path / "steps.jsonl"
        for step in (1, 2, 3):
            files.append_line(file, {"step": step, "x": 0.1 * step})
        with file.open("a", encoding="utf-8") as stream:
            stream.write('{"step": 4, "x"')
        assert [line["step"] for line in files.read_lines(file)] == [1, 2, 3]
        files.keep_lines(file, 2)
        assert file.read_text(encoding="utf-8") == '{"step": 1, "x": 0.1}\n{"step": 2, "x": 0.2}\n'

    def test_no_file_no_lines(self, tmp_path: Path) -> None:
        assert list(files.read_lines(tmp_path / "none.jsonl")) == []
        files.keep_lines(tmp_path / "none.jsonl", 3)
