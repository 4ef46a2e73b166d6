"""Settings of a process: read, compared, put back."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from marl_core.registry.importing import process_state_restored
from marl_core.registry.snapshot import Setting, Snapshot, random_states, torch_modes, working_folder


def all_settings() -> list[Setting]:
    return [*random_states(), working_folder(), *torch_modes()]


def change_all(tmp_path: Path) -> None:
    random.random()
    numpy.random.rand()
    torch.rand(1)
    os.chdir(tmp_path)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)


def test_everything_is_put_back_and_named(tmp_path: Path) -> None:
    before = Snapshot.of(all_settings())
    threads = torch.get_num_threads()
    change_all(tmp_path)
    told = [str(change) for change in before.put_back()]
    assert told == [
        "Python's random state",
        "numpy's random state",
        "torch's random state",
        "the working folder",
        f"the number of threads ({threads} to {threads + 1})",
        "torch's default dtype (torch.float32 to torch.float64)",
        "gradient mode",
        "torch's deterministic mode",
    ]
    assert before.changes() == []


def test_nothing_changed_is_nothing_said() -> None:
    with process_state_restored() as undone:
        pass
    assert undone == []


def test_what_an_import_changed(tmp_path: Path) -> None:
    with process_state_restored() as undone:
        change_all(tmp_path)
    assert "numpy's random state" in undone
    assert "the number of threads" in undone


def test_two_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"a": None}
    settings = [Setting("a", lambda: value["a"], shows_values=True)]
    before = Snapshot.of(settings)
    monkeypatch.setitem(value, "a", 3)
    assert [str(change) for change in before.changes(Snapshot.of(settings))] == ["a (None to 3)"]
    assert before.changes(Snapshot.of([])) == []
    assert len(before.put_back()) == 1  # only looked at
    assert value["a"] == 3


def test_a_deleted_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert Snapshot.of([working_folder()]).put_back() == []


def test_no_library_is_imported_for_it() -> None:
    code = (
        "import sys; from marl_core.registry.snapshot import *; n = len([*random_states(), *torch_modes()]); "
        "print(n, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1 False False"
