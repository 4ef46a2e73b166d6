"""A long run: memory, open files and seconds per step stay flat, and no line is lost."""

from __future__ import annotations

import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from marl_core import RunConfig, Runner

pytestmark = pytest.mark.nightly
MakeConfig = Callable[..., RunConfig]
STEPS = 600
WARM = 150
"""Steps until caches and allocators have settled."""
MEMORY_KIB_PER_STEP = 4.0
"""Allowed slope; one float32 copy of the tiny policy's tensors a step would be 16 KiB."""


def resident_kib() -> int:
    """Memory of this process now, in KiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() // 1024


def slope(values: list[float]) -> float:
    """Change per step of a straight line through the values (Theil-Sen: outliers of a busy machine don't count)."""
    places = range(0, len(values), 5)
    pairs = [(values[j] - values[i]) / (j - i) for i in places for j in places if j > i]
    return statistics.median(pairs)


def test_nothing_grows(
    make_config: MakeConfig, reward_adapter: str, rewards_file: str, prompts_file: str, tmp_path: Path
) -> None:
    """Checkpoints, evaluations, observers and two rewards, over 600 steps."""
    config = make_config(
        reward=[{"use": "adapter", "path": reward_adapter}, {"use": "function", "target": f"{rewards_file}:odd"}],
        value={"on": "own", "r": 4},
        ppo={
            "steps": STEPS,
            "batch": 4,
            "minibatch": 2,
            "epochs": 2,
            "kl": {"coef": 0.1, "target": 6.0},
            "learning_rate": 1e-4,
        },
        eval={"prompts": prompts_file, "every": 20, "limit": 2},
        observers=["json-lines", {"use": "console", "samples_every": 50}],
        run={"folder": str(tmp_path / "run"), "checkpoint_every": 10, "keep": 2},
    )
    runner = Runner(config)
    memory: list[float] = []
    seconds: list[float] = []
    open_files: list[int] = []
    start, before = time.perf_counter(), time.process_time()
    for _ in runner.steps():
        memory.append(resident_kib())
        open_files.append(len(os.listdir("/proc/self/fd")))
        seconds.append(time.process_time() - before)  # the processor's: other programs on the machine don't count
        before = time.process_time()
    spent = time.perf_counter() - start
    grows, slows = slope(memory[WARM:]), slope(seconds[WARM:])
    middle = statistics.median(seconds[WARM:])
    print(
        f"\nsoak: {STEPS} steps in {spent:.0f} s; resident {memory[WARM] / 1024:.0f} -> {memory[-1] / 1024:.0f} MiB, "
        f"{grows:.2f} KiB a step; open files {min(open_files[WARM:])} to {max(open_files[WARM:])}; "
        f"{middle:.4f} s a step (median), {slows * STEPS / middle:+.1%} over the run"
    )
    assert grows < MEMORY_KIB_PER_STEP
    assert len(set(open_files[WARM:])) == 1
    assert abs(slows) * STEPS < 0.25 * middle
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    evaluated = [
        json.loads(line)["step"] for line in (tmp_path / "run" / "evals.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert evaluated == list(range(0, STEPS, 20))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000590", "step-000600"]
