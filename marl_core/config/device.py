"""On which kind of device a run will compute, and what is known of that: told before torch is imported."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from marl_core.config.run_config import RunConfig

NVIDIA_DEVICE_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")
GPU_DEVICE_FILES = (*NVIDIA_DEVICE_FILES, "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/nvmap", "/dev/kfd")
"""Those, of NVIDIA's boards with a GPU of their own kind, and of AMD's cards, which torch calls cuda too."""
HIDING = ("", "-1")
"""Values of CUDA_VISIBLE_DEVICES that leave no device."""
MEASURED_ON_CPU_ONLY = ("merge_for_sampling", "capture", "recompute_cheap", "short_attention", "trim_memory", "compile")
"""Keys of `speed` whose fast path was measured on CPUs only: on CUDA each is off unless the config asks for it."""


def device_of(config: RunConfig) -> str:
    """`cpu` or `cuda`; for `auto` what this machine looks like."""
    return machine_device() if config.run.device == "auto" else config.run.device


def machine_device() -> str:
    """What `run.device: auto` will be taken for here, as far as that shows without torch: `cuda` where there is an NVIDIA device."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in HIDING
    return "cuda" if not hidden and any(os.path.exists(file) for file in NVIDIA_DEVICE_FILES) else "cpu"


def missing_device(config: RunConfig) -> list[str]:
    """That the device which a config asks for doesn't show here; whether torch finds one is seen when the run starts."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in HIDING
    if config.run.device != "cuda" or (not hidden and any(os.path.exists(file) for file in GPU_DEVICE_FILES)):
        return []
    why = "CUDA_VISIBLE_DEVICES hides every GPU" if hidden else "this machine shows no GPU"
    return [
        f"run.device: cuda was asked for, and {why}: the run would be refused here. Use device: auto or cpu, or run it where one is."
    ]


def device_warnings(config: RunConfig) -> list[str]:
    """What isn't known of this run on its device."""
    if device_of(config) == "cpu":
        return []
    keys = [f"speed.{key}" for key in MEASURED_ON_CPU_ONLY if getattr(config.speed, key)]
    return [
        "run.device: cuda is not measured on a GPU yet: everything that marl says of speed and memory was measured on CPUs. "
        + (
            f"{' and '.join(keys)}, which this config asks for, {'was' if len(keys) == 1 else 'were'} never held against the plain path "
            "on a GPU. "
            if keys
            else "Fast paths that only a CPU has proven are off there. "
        )
        + "The checks of each run (reference, first ratio, base unchanged) hold there as anywhere; docs/gpu.md says more."
    ]
