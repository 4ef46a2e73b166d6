"""benchmarks/gpu/run.py: whatever becomes of a part, what it measured is kept, and the others run."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
PART = """
import json, subprocess, sys, time
out = sys.argv[sys.argv.index("--out") + 1]
def write(*rows):
    open(out, "w").write(json.dumps({"rows": rows}))
    print(json.dumps(rows[-1]), flush=True)
"""
PARTS = {
    "good": 'write({"name": "one", "ms": 1.25}); write({"name": "one", "ms": 1.25}, {"name": "two", "skipped": "no card"})',
    "fails": 'write({"name": "bad", "failed": "RuntimeError: on cpu and cuda:0", "where": ["in line 3"]})',
    "hangs": (
        'child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]); '
        'write({"name": "child", "pid": child.pid}); time.sleep(60)'
    ),
    "breaks": 'write({"name": "first", "s": 2}); sys.exit(3)',
    "silent": "sys.exit(4)",
}


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with parts of our own."""
    spec = importlib.util.spec_from_file_location("gpu_run", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_run", module)  # dataclasses look there
    spec.loader.exec_module(module)
    for name, code in PARTS.items():
        (tmp_path / f"{name}.py").write_text(PART + code, encoding="utf-8")
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "GRACE", 0.5)
    monkeypatch.setattr(module, "PARTS", tuple(module.Part(name, 20, 1, 20, f"what {name} is") for name in PARTS))
    return module


def run(check: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(out), *words])
    code: int = check.main()
    return code


def test_a_good_part_is_measured(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(check, monkeypatch, tmp_path / "out", "--parts", "good") == 0
    said = capsys.readouterr().out
    assert "one: ms 1.25" in said
    assert "two: SKIPPED: no card" in said
    assert "nothing failed" in said
    (part,) = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert (part["measured"], part["skipped"], part["failed"], part["ended"]) == (1, 1, 0, "done")


def test_what_failed_comes_first_and_the_others_run(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(check, monkeypatch, tmp_path / "out", "--parts", "fails", "breaks", "silent", "good") == 1
    said = capsys.readouterr().out
    assert said.index("1 failed\n  fails: bad: RuntimeError: on cpu and cuda:0\n      in line 3") < said.index(
        "how it ended"
    )
    ended = {part["part"]: part for part in json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))}
    assert ended["breaks"]["ended"] == "ended with exit code 3"
    assert ended["breaks"]["measured"] == 1
    assert ended["silent"]["measured"] == 0
    assert ended["good"]["ended"] == "done"


def test_a_part_that_hangs_is_killed_with_its_children_and_its_rows_stay(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.perf_counter()
    assert run(check, monkeypatch, tmp_path / "out", "--parts", "hangs", "good", "--seconds", "5") == 1
    assert time.perf_counter() - began < 30
    good, hung = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert hung["ended"] == "killed at its limit"
    assert hung["measured"] == 1
    assert good["ended"] == "done"
    (row,) = json.loads((tmp_path / "out" / "hangs.json").read_text(encoding="utf-8"))["rows"]
    assert not alive(row["pid"])


def alive(pid: int) -> bool:
    """Whether a process is there and not merely waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_part_begins_when_the_whole_has_no_time_left(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(check, monkeypatch, tmp_path / "out", "--parts", "good", "--minutes", "0.05") == 1
    (part,) = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert part["ended"].startswith("not begun")


def test_every_part_has_its_script_and_its_limit_fits_the_whole() -> None:
    spec = importlib.util.spec_from_file_location("gpu_run", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_run"] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["gpu_run"]
    assert all((FOLDER / f"{part.name}.py").is_file() for part in module.PARTS)
    assert sum(part.seconds for part in module.PARTS) <= 8 * 60
    assert all(part.expected <= part.seconds for part in module.PARTS)
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    for part in module.PARTS:
        assert f"| `{part.name}` |" in page
        assert f"| {part.seconds:g} | {part.expected:g} |" in page
    assert os.access(FOLDER / "run.sh", os.X_OK)
