"""What strategies keep in a checkpoint: tensors, each under its strategy's config key and its own name."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from marl_core.bank.adapters import AdapterBank
from marl_core.errors import DataError, PluginError
from marl_core.plan.plan import Plan
from marl_core.store.checkpoint import STRATEGIES_FILE


def collect(plan: Plan, bank: AdapterBank, policy: str) -> dict[str, Tensor]:
    """All strategies' tensors as `key|name`, `key` being the strategy's in the config; copied to the CPU."""
    return {
        f"{key}|{name}": tensor.detach().cpu().contiguous().clone()
        for strategy, key in plan.places.items()
        for name, tensor in plan.hooks.state(strategy, bank, policy).items()
    }


def restore(checkpoint: Path, plan: Plan, bank: AdapterBank, policy: str) -> None:
    """Give each strategy its tensors from the checkpoint.

    DataError when a strategy that keeps state finds none, PluginError when it keeps state and can't take it back.
    """
    file = checkpoint / STRATEGIES_FILE
    try:
        saved = load_file(file) if file.is_file() else {}
    except (OSError, SafetensorError) as error:
        raise DataError(f"resume: {file} can't be read ({error}). Resume from an older checkpoint.") from error
    for strategy, key in plan.places.items():
        if not plan.hooks.state(strategy, bank, policy):
            continue
        origin = plan.hooks.origin(strategy)
        if not plan.hooks.implements(strategy, "marl_restore"):
            raise PluginError(
                f"{origin}: has marl_state but no marl_restore, so it can't be resumed. See docs/hooks.md."
            )
        tensors = {name.split("|", 1)[1]: tensor for name, tensor in saved.items() if name.split("|", 1)[0] == key}
        if not tensors:
            raise DataError(
                f"resume: {checkpoint} holds nothing of {key} ({origin}), which keeps state in checkpoints. "
                "Resume with the strategies the run was started with."
            )
        plan.hooks.restore(strategy, tensors, bank, policy)
