"""A run from start to end."""

from marl_core.run.allocator import align_large_blocks

align_large_blocks()  # before the first tensor of the run
