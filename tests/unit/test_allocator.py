"""Memory that comes back, and large blocks that don't break up the heap."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from marl_core.run import allocator

ALIGNED = """
import {first}
import marl_core.run
import torch
print(all(torch.empty(2**20 + 64 * i).data_ptr() % 4096 == 0 for i in range(4)))
"""


@pytest.mark.skipif(not allocator.HUGE_PAGES.exists(), reason="a system without huge pages")
@pytest.mark.parametrize(
    ("first", "given", "aligned"),
    [("marl_core", {}, "True"), ("torch", {}, "True"), ("marl_core", {allocator.SWITCH: "0"}, "False")],
)
def test_large_blocks_begin_at_a_page_unless_the_user_says_no(first: str, given: dict[str, str], aligned: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != allocator.SWITCH} | given
    done = subprocess.run(
        [sys.executable, "-c", ALIGNED.format(first=first)], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == aligned


def test_a_system_without_huge_pages_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(allocator, "HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.delenv(allocator.SWITCH, raising=False)
    allocator.align_large_blocks()
    assert allocator.SWITCH not in os.environ


SHAPES = """
import {first}
import marl_core.run
import torch
weight = torch.ones(8, 8, 3, 3)
for size in [*range(80, 160), 80]:
    torch.nn.functional.conv2d(torch.ones(1, 8, size, size), weight)
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize(
    ("first", "given", "kept"),
    [("marl_core", {}, False), ("torch", {}, False), ("marl_core", {allocator.KERNELS: "1024"}, True)],
)
def test_kernels_of_shapes_long_gone_are_forgotten_unless_the_user_says_no(
    first: str, given: dict[str, str], kept: bool
) -> None:
    """Convolutions, because large ones are oneDNN's on every x86 machine; products are only in half precision."""
    environment = {name: value for name, value in os.environ.items() if name != allocator.KERNELS}
    environment |= {"ONEDNN_VERBOSE": "all", "OMP_NUM_THREADS": "1", **given}
    done = subprocess.run(
        [sys.executable, "-c", SHAPES.format(first=first)], capture_output=True, text=True, check=True, env=environment
    )
    made = [line for line in done.stdout.splitlines() if "create:cache_" in line and ",convolution," in line]
    if not made:
        pytest.skip("convolutions of this machine aren't oneDNN's")
    assert ("create:cache_hit" in made[-1]) is kept
