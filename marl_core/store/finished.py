"""Resuming a run that has nothing left to do: told before any weight is read."""

from __future__ import annotations

import filecmp
from pathlib import Path

from marl_core.config.run_config import RunConfig
from marl_core.store import checkpoint
from marl_core.store.files import read_lines
from marl_core.store.live_mark import is_last_page

ADAPTER_FILE = Path("policy", "adapter_model.safetensors")


def finished(config: RunConfig) -> str | None:
    """What to tell who resumes a finished run: how far it is, where the results are, how to go on; None when work is left.

    A run is finished when its newest checkpoint has all steps, and final adapter, last evaluation and report were written after it.
    """
    folder = Path(config.run.folder or "").expanduser()
    saved = checkpoint.saved(folder / "checkpoints")
    if config.run.folder is None or not saved:
        return None
    done = checkpoint.step_of(saved[-1])
    if done < config.ppo.steps or not _closed(folder, saved[-1], done, config.eval.prompts is not None):
        return None
    override = (
        ""
        if config.ppo.schedule == "constant"
        else " --override (the learning rate's schedule depends on the number of steps)"
    )
    return (
        f"{folder}: this run is finished, {done} steps of {config.ppo.steps} are done. Nothing was changed.\n"
        f"  final adapter: {folder / 'final' / 'policy'}\n"
        f"  report:        {folder / 'report.html'}\n"
        f"To train on, ask for more steps: --resume --set ppo.steps={2 * done}{override}. To start afresh: --set run.folder=ANOTHER"
    )


def _closed(folder: Path, last: Path, done: int, evaluated: bool) -> bool:
    """Whether the end was written too: a run may be killed between its last checkpoint and that."""
    checkpoint_adapter, final_adapter = last / ADAPTER_FILE, folder / "final" / ADAPTER_FILE
    if not (checkpoint_adapter.is_file() and final_adapter.is_file() and is_last_page(folder / "report.html")):
        return False
    if checkpoint.damage(last) is not None or not filecmp.cmp(checkpoint_adapter, final_adapter, shallow=False):
        return False
    return not evaluated or any(line["step"] == done for line in read_lines(folder / "evals.jsonl"))
