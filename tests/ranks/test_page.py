"""docs/many-processes.md is true: its command runs, its YAML is a config."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from marl_core.config.run_config import ModelSection
from marl_core.config.yaml_text import parse_yaml

PAGE = (Path(__file__).resolve().parents[2] / "docs/many-processes.md").read_text(encoding="utf-8")


def test_the_command_runs(tiny_folder: str, prompts_file: str, rewards_file: str, tmp_path: Path) -> None:
    (command,) = re.findall(r"```sh\n(.*?)\n```", PAGE, flags=re.DOTALL)
    program, launch, *rest = shlex.split(command)
    assert (program, launch) == ("accelerate", "launch")
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {tiny_folder}, dtype: float32}}\nreference: disabled-adapter\npolicy: {{r: 2, alpha: 4}}\n"
        f"reward: {{use: function, target: '{rewards_file}:odd'}}\ndata: {{prompts: {prompts_file}}}\n"
        "sampling: {max_new_tokens: 4}\nppo: {steps: 1, batch: 4, minibatch: 4, epochs: 1}\n"
        "observers: [console, json-lines]\nrun: {device: cpu, folder: out, timeout_seconds: 60.0}\n",
        encoding="utf-8",
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", port, *rest],
        cwd=tmp_path, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step-0 KL is bitwise 0") == 1
    (line,) = (tmp_path / "out/steps.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["step"] == 1
    assert (tmp_path / "out/final/policy/adapter_model.safetensors").is_file()


def test_the_yaml_is_a_config() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    assert ModelSection.model_validate(parse_yaml(text, "docs/many-processes.md")["model"]).shard == "fsdp2"
