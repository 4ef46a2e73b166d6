"""Faults of pluggy, safetensors and torch: each test reproduces one, and fails when it is mended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pluggy
import torch
from safetensors.torch import load_file, save_file

Still = Callable[[bool, str], None]


def test_a_misspelt_hook_is_accepted(still: Still) -> None:
    specs, impls = pluggy.HookspecMarker("x"), pluggy.HookimplMarker("x")

    class Specs:
        @specs
        def reward(self) -> None: ...

    class Plugin:
        @impls
        def rewrad(self) -> None: ...

    manager = pluggy.PluginManager("x")
    manager.add_hookspecs(Specs)
    try:
        manager.register(Plugin())
        silent = True
    except pluggy.PluginValidationError:
        silent = False
    still(silent, "marl_core/registry/hooks.py")


def test_a_flipped_bit_is_loaded(still: Still, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4)}, file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)
    still(float(load_file(file)["a"][3]) != 1.0, "marl_core/store/checkpoint.py")


def test_clipping_spreads_one_nan_over_all_gradients(still: Still) -> None:
    good, bad = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    good.grad, bad.grad = torch.ones(2), torch.tensor([1.0, float("nan")])
    torch.nn.utils.clip_grad_norm_([good, bad], 1.0)
    still(bool(good.grad.isnan().all()), "marl_core/ppo/update.py")
