"""Runs whose rewards are functions of the program itself: a script, started twice, and its resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marl_core import Catalog, ConfigError, RunConfig, Runner
from marl_core.config.load import parse_config
from marl_core.store.input_files import named

MakeConfig = Callable[..., RunConfig]
SCRIPT = """import sys
from marl_core import RunConfig, Runner

with open("started", "a") as stream:
    stream.write("x")


def odd(completion_ids, **columns):
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def brevity(completion_ids, **columns):
    return [-float(len(ids)) for ids in completion_ids]


config = RunConfig(
    model={"path": sys.argv[1], "dtype": "float32"},
    policy={"r": 4, "alpha": 8},
    reference="disabled-adapter",
    reward=[odd, {"use": "function", "target": "__main__:brevity", "weight": 0.1}],
    data={"prompts": sys.argv[2]},
    sampling={"max_new_tokens": 6},
    ppo={"steps": STEPS, "batch": 4, "minibatch": 2},
    eval={"prompts": sys.argv[2], "limit": 2, "judges": {"odd": {"use": "function", "target": f"{__file__}:odd"}}},
    run={"folder": "run", "device": "cpu", "threads": 1},
)
result = Runner(config, resume=RESUME).train()
print(sorted(name for name in result.last.metrics if name.startswith("reward/")), result.after.judges["odd"]["judged"])
"""


def fewer(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Odd tokens."""
    return [-float(sum(token % 2 for token in ids)) for ids in completion_ids]


def other(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Nothing."""
    return [0.0 for _ in completion_ids]


def test_a_script_without_a_guard_is_executed_once_and_goes_on_when_it_was_edited(
    tmp_path: Path, tiny_folder: str, prompts_file: str
) -> None:
    def start(steps: int, resume: bool) -> str:
        text = SCRIPT.replace("STEPS", str(steps)).replace("RESUME", str(resume))
        (tmp_path / "train.py").write_text(text, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "train.py", tiny_folder, prompts_file],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert "['reward/function', 'reward/odd'] 1.0" in start(1, resume=False)
    assert (tmp_path / "started").read_text() == "x"
    files = json.loads((tmp_path / "run" / "provenance.json").read_text(encoding="utf-8"))["files"]
    assert {name: digest[:6] for name, digest in files.items() if ":" in name} == {
        "__main__:brevity": "lines-",
        "__main__:odd": "lines-",
    }
    start(2, resume=True)  # the script's text is another, its rewards are the same
    assert (tmp_path / "started").read_text() == "xx"


class TestResume:
    def config(self, make_config: MakeConfig, folder: Path, reward: Any, steps: int) -> RunConfig:
        written = make_config(run={"folder": str(folder)}, ppo={"steps": steps}).model_dump(by_alias=True)
        return parse_config({**written, "reward": reward}, "test", Catalog.installed())

    def test_with_the_same_function(self, make_config: MakeConfig, tmp_path: Path) -> None:
        Runner(self.config(make_config, tmp_path / "whole", fewer, 2)).train()
        Runner(self.config(make_config, tmp_path / "run", fewer, 1)).train()
        resumed = Runner(self.config(make_config, tmp_path / "run", fewer, 2), resume=True)
        resumed.train()
        assert resumed.folder is not None
        assert resumed.folder.notes == ["config changed: ppo.steps: 1 -> 2", "resumed from step-000001"]
        finals = (tmp_path / "whole" / "final", tmp_path / "run" / "final")
        whole, parts = (next(final.rglob("adapter_model.safetensors")).read_bytes() for final in finals)
        assert whole == parts

    def test_another_function_is_refused(self, make_config: MakeConfig, tmp_path: Path) -> None:
        Runner(self.config(make_config, tmp_path / "run", fewer, 1)).train()
        with pytest.raises(ConfigError, match=r"reward\.0\.target: '.*:fewer' -> '.*:other'"):
            Runner(self.config(make_config, tmp_path / "run", {"use": other, "name": "fewer"}, 2), resume=True)

    def test_another_text_of_its_file_is_refused(self, make_config: MakeConfig, tmp_path: Path) -> None:
        Runner(self.config(make_config, tmp_path / "run", fewer, 1)).train()
        file = tmp_path / "run" / "provenance.json"
        record = json.loads(file.read_text(encoding="utf-8"))
        (name,) = (name for name in record["files"] if name.endswith(":fewer"))
        assert record["files"][name] == named(__file__)[__file__]
        record["files"][name] = "0" * 64
        file.write_text(json.dumps(record), encoding="utf-8")
        with pytest.raises(ConfigError, match=r"changed since the run was started: file .*:fewer"):
            Runner(self.config(make_config, tmp_path / "run", fewer, 2), resume=True)
