"""A run from start to end."""

from marl_core.run.allocator import align_large_blocks, keep_few_kernels

align_large_blocks()  # both before the first tensor of the run
keep_few_kernels()
