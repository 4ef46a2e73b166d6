"""Freed memory is the system's again: large blocks at once, whatever else is held."""

import os
import subprocess
import sys

import pytest

PROBE = """
import torch
from pathlib import Path
from marl_core.run.give_back import LARGE, large_blocks_alone

def resident():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) * 1024

assert large_blocks_alone() == EXPECTED
torch.ones(2**23).sum()  # a large block that is freed: glibc would now keep blocks of this size for later
before = resident()
held, freed = [], []
for _ in range(24):  # large blocks, each followed by a smaller one that stays
    freed.append(torch.ones(LARGE))
    held.append(torch.ones(LARGE // 16))
del freed
print((resident() - before) / (24 * 4 * LARGE))
"""


def kept_after_freeing(expected: bool, environment: dict[str, str]) -> float:
    """Share of the freed bytes that stay resident."""
    code = PROBE.replace("EXPECTED", str(expected))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_large_blocks_are_returned_as_soon_as_they_are_freed() -> None:
    plain = {name: value for name, value in os.environ.items() if name != "MALLOC_MMAP_THRESHOLD_"}
    assert kept_after_freeing(True, plain) < 0.2  # the smaller ones are a sixteenth
    own_wish = plain | {
        "MALLOC_MMAP_THRESHOLD_": str(2**25)
    }  # the user's own wish is left alone, and shows the difference
    assert kept_after_freeing(False, own_wish) > 0.5
