"""Does the adapter's file hold all of it? What a checkpoint, `final/` and plain peft would give back, tried before a run begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from marl_core.artifacts.adapter_files import WEIGHTS_FILE
from marl_core.bank.adapters import AdapterBank
from marl_core.errors import ConfigError, DataError
from marl_core.ppo.scoring import forward
from marl_core.ppo.seeds import derive_seed
from marl_core.ppo.step import Step
from marl_core.ppo.types import Rollout
from marl_core.safety.findings import PreflightCheck

OTHER_KIND = "Use another kind of adapter, e.g. lora."
ROWS = 2
"""Rows that both are compared on: each of its tensors changes every row."""


def file_check(step: Step, rollout: Rollout) -> PreflightCheck:
    """Write the policy, make a second adapter from that file with another seed, compare bitwise, and take it out again.

    To be called while the policy is moved: a fresh one's update is zero, whatever its file lacks. ConfigError when they differ.
    """
    policy, few = step.roles.trained.policy, rollout.select(slice(0, ROWS))
    first, again = (_logprobs(step, policy, few) for _ in range(2))
    try:
        with TemporaryDirectory(prefix="marl-preflight-") as folder, _copy(step.bank, policy, Path(folder)) as name:
            other = _logprobs(step, name, few)
    except (OSError, SafetensorError) as error:
        return PreflightCheck("file", False, f"whether the adapter's file holds all of it wasn't tried: {error}")
    gap, noise = (float((one - first).abs().nan_to_num(torch.inf).max()) for one in (other, again))
    if gap > noise:
        raise ConfigError(
            f"pre-flight: an adapter made from the policy's own saved file gives other log-probs than it, by up to {gap:.2g} nats a "
            "token, so a checkpoint or final/ would hold another policy than the one that is trained. Its file lacks something that learns "
            f"or that was drawn at random when it was made. {OTHER_KIND}"
        )
    return PreflightCheck(
        "file", True, "an adapter made from its saved file gives bitwise the same log-probs", {"max_difference": gap}
    )


@torch.no_grad()
def _logprobs(step: Step, adapter: str, rollout: Rollout) -> Tensor:
    options = step.budget.train.options
    if options is not None:  # an adapter that is here for three passes isn't worth compiling for
        options = replace(options, compiled=False)
    with step.bank.using(adapter, options=options):
        return forward(step.bank, rollout, step.temperature).logprobs


@contextmanager
def _copy(bank: AdapterBank, policy: str, folder: Path) -> Iterator[str]:
    """A block with a second adapter that is what `policy`'s file says, by name."""
    bank.save(policy, folder)
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    tensors, name = load_file(str(folder / WEIGHTS_FILE)), _free_name(bank)
    bank.add(name, config, trainable=False, seed=derive_seed("preflight file"))
    try:
        try:
            bank.fill(name, tensors)
        except DataError as error:
            raise ConfigError(
                f"pre-flight: the policy's own saved file can't be read back: {error} {OTHER_KIND}"
            ) from error
        yield name
    finally:
        bank.remove(name)


def _free_name(bank: AdapterBank) -> str:
    name, number = "preflight-file", 2
    while name in (*bank.adapters, *bank.heads):
        name, number = f"preflight-file-{number}", number + 1
    return name
