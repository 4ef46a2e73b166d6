"""Memory that comes back, and large blocks that don't break up the heap."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from marl_core.run import host

ALIGNED = """
import {first}
from marl_core.run.host import set_up_process
set_up_process()
import torch
print(all(torch.empty(2**20 + 64 * i).data_ptr() % 4096 == 0 for i in range(4)))
"""


@pytest.mark.skipif(not host.HUGE_PAGES.exists(), reason="a system without huge pages")
@pytest.mark.parametrize(
    ("first", "given", "aligned"),
    [("marl_core", {}, "True"), ("torch", {}, "True"), ("marl_core", {host.ALIGN_VARIABLE: "0"}, "False")],
)
def test_large_blocks_begin_at_a_page_unless_the_user_says_no(first: str, given: dict[str, str], aligned: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != host.ALIGN_VARIABLE} | given
    done = subprocess.run(
        [sys.executable, "-c", ALIGNED.format(first=first)], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == aligned


def test_a_system_without_huge_pages_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.delenv(host.ALIGN_VARIABLE, raising=False)
    host.align_large_blocks()
    assert host.ALIGN_VARIABLE not in os.environ


SHAPES = """
import {first}
from marl_core.run.host import set_up_process
set_up_process()
import torch
torch.set_num_threads(1)
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
def multiply(lengths):
    for length in lengths:
        torch.ones(length, 64, dtype=torch.bfloat16) @ weight
weight = torch.ones(64, 64, dtype=torch.bfloat16)
multiply(range(100, 164))
before = resident()
multiply(range(164, 364))
print(resident() - before)
"""


def grown(first: str, **given: str) -> float:
    """MiB that products of 200 new shapes leave behind, in a process of their own."""
    environment = {name: value for name, value in os.environ.items() if name not in host.KERNEL_CACHE_VARIABLES} | given
    code = SHAPES.format(first=first)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_kernels_of_shapes_long_gone_are_forgotten_unless_the_user_says_no() -> None:
    """Each shape's kernel holds 0.6 MiB here: 128 MiB kept, 5 when forgotten; a quarter leaves room for another machine."""
    kept = grown("marl_core", **dict.fromkeys(host.KERNEL_CACHE_VARIABLES, "1024"))
    if kept < 20:
        pytest.skip("half precision products of this machine aren't oneDNN's")
    assert grown("marl_core") < kept / 4
    assert grown("torch") < kept / 4
