"""The light half stays light: measured in a fresh interpreter, not only read from the source."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "numpy", "accelerate", "safetensors")
SECONDS = 0.7

CONFIG = """
model: {path: owner/model}
reference: disabled-adapter
reward: {use: function, target: "mine.py:score"}
data: {prompts: prompts.jsonl}
"""

PROBE = """
import json, sys
from marl_core.cli.app import main
code = main(sys.argv[1:])
print()
print(json.dumps([code, sorted(name for name in sys.modules if "." not in name)]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    (tmp_path / "mine.py").write_text(
        "def score(prompts, completions, **columns):\n    return [0.0]\n", encoding="utf-8"
    )
    return tmp_path


COMMANDS = (["--help"], ["plugins"], ["check", "run.yaml"], ["schema"])


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_i28_commands_import_nothing_heavy_and_answer_quickly(folder: Path, command: list[str]) -> None:
    fastest = float("inf")
    for _ in range(3):  # the processor's time, and the best of three: a busy machine changes neither much
        start = _cpu_seconds_of_children()
        done = subprocess.run(
            [sys.executable, "-c", PROBE, *command], cwd=folder, capture_output=True, text=True, check=True
        )
        fastest = min(fastest, _cpu_seconds_of_children() - start)
        if fastest < SECONDS:
            break
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    assert not set(HEAVY) & set(modules)
    assert fastest < SECONDS


SECONDS_WITH_A_TOKENIZER = 3.0


def test_prompts_are_tokenized_without_torch(folder: Path, tiny_folder: str) -> None:
    (folder / "run.yaml").write_text(CONFIG.replace("owner/model", tiny_folder), encoding="utf-8")
    start = _cpu_seconds_of_children()
    command = [sys.executable, "-c", PROBE, "check", "run.yaml", "--show", "1"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    assert "data.prompts, row 1: 1 token\na\n" in done.stdout
    assert done.stderr == ""
    assert not {"torch", "transformers"} & set(modules)  # nor is a transformers without torch left behind
    assert _cpu_seconds_of_children() - start < SECONDS_WITH_A_TOKENIZER


def _cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


REFUSED = (
    ["chat", "runs/nope"],
    ["chat", "runs/nope", "--model", "owner/model"],
    ["replay", "runs/nope"],
    ["replay", "runs/cut"],
    ["merge", "--model", "./nope", "--adapter", "runs/cut", "--out", "new"],
    ["certify", "runs/cut", "--model", "owner/model"],
    ["run", "run.yaml", "--set", "run.folder=runs/cut"],
    ["run", "run.yaml", "--set", "run.folder=runs/cut", "--resume"],
)


@pytest.mark.parametrize("command", REFUSED, ids=" ".join)
def test_a_path_that_is_wrong_is_told_before_anything_heavy_is_imported(folder: Path, command: list[str]) -> None:
    (folder / "runs" / "cut").mkdir(parents=True)
    (folder / "runs" / "cut" / "config.yaml").write_text(CONFIG + "ppo: {gamma: 0.5}\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *command], cwd=folder, capture_output=True, text=True, check=True
    )
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code in (2, 4), done.stderr
    assert done.stderr.startswith("marl: ")
    assert "a bug in marl" not in done.stderr
    assert not set(HEAVY) & set(modules)


def test_built_in_strategies_load_without_heavy_libraries(folder: Path) -> None:
    probe = (
        "import sys, marl_core\n"
        "catalog = marl_core.Catalog.installed()\n"
        "from marl_core.registry.families import FAMILIES\n"
        "for family in FAMILIES:\n"
        "    for listing in catalog.listings(family):\n"
        "        if listing.package == 'marl-core':\n"
        "            catalog.load(family, listing.qualified_name).strategy_class.model_json_schema()\n"
        "print(*(name for name in sys.modules if '.' not in name))\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=folder, capture_output=True, text=True, check=True)
    assert not set(HEAVY) & set(done.stdout.split())
